"""The mean of the task gradients."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, all_active, from_weights


def weights(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Weight `1/K` for each of the `K` active tasks, 0 for the others.

    Args:
        gramian: Inner products of the task gradients; only its size and dtype matter.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the Gramian's dtype.
    """
    active = all_active(gramian.shape[0]) if active is None else active
    present = active.astype(gramian.dtype)
    return present / jnp.maximum(jnp.sum(present), 1)


def mean(num_tasks: int) -> Aggregator:
    """Average the task gradients: `d = (1/K) sum_k g_k` over the `K` active tasks.

    The gradient of the mean loss, at the cost of `sum`. A zero gradient counts.

    Args:
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.
    """
    return from_weights(weights, num_tasks)
