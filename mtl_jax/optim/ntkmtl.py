"""NTKMTL: weights that let every task learn at the same speed."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows


def weights(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Weights `sqrt(mean_j |g_j|²) / |g_k|`.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the Gramian's dtype, 0 for inactive tasks and zero gradients.
    """
    _, norms, active = unit_rows(gramian, active)
    largest = jnp.max(norms)
    relative = norms / jnp.where(largest > 0, largest, 1)
    count = jnp.maximum(jnp.sum(active), 1).astype(norms.dtype)
    typical = jnp.sqrt(jnp.sum(relative**2) / count)
    return jnp.where(norms > 0, typical / jnp.where(norms > 0, relative, 1), 0)


def ntkmtl(num_tasks: int) -> Aggregator:
    """Scale every task gradient to their root mean square norm and add them up.

    The speed at which a task's loss falls is the top eigenvalue of its neural tangent
    kernel. Over a single mini-batch that is `|g_k|²`, and `w_k = sqrt(mean_j |g_j|²) /
    |g_k|` makes all speeds equal.

    A zero gradient adds nothing, but counts in the mean; opposite gradients cancel
    whatever their norms; duplicates count twice. Cost: the diagonal of the Gramian.

    Args:
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Qin et al., NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural
        Tangent Kernel Perspective, NeurIPS 2025, https://arxiv.org/abs/2510.18258, with
        one mini-batch.
    """
    return from_weights(weights, num_tasks)
