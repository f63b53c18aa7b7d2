"""The plain sum of task gradients: linear scalarisation, the baseline."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, from_weights


def weights(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Weight 1 for every active task, 0 for the others.

    Args:
        gramian: Inner products of the task gradients; only its size and dtype matter.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the Gramian's dtype.
    """
    if active is None:
        return jnp.ones(gramian.shape[0], gramian.dtype)
    return active.astype(gramian.dtype)


def sum(num_tasks: int) -> Aggregator:
    """Add up the task gradients: `d = sum_k g_k`.

    Equals the gradient of the summed losses, and costs nothing beyond the task
    gradients: the unused Gramian is compiled away. A zero gradient adds nothing.

    Args:
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.
    """
    return from_weights(weights, num_tasks)
