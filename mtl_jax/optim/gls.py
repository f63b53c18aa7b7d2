"""GLS: the geometric mean of the losses."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import all_active
from mtl_jax.optim.balancer import Balancer, log_limit, make_balancer, positive_losses


def weights(
    losses: Float[Array, " tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Derivatives of the geometric mean of the positive losses.

    Args:
        losses: Losses of all tasks.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the losses' dtype, 0 for absent tasks.
    """
    active = all_active(losses.shape[0]) if active is None else active
    losses, present = positive_losses(losses, active)
    count = jnp.maximum(jnp.sum(present), 1).astype(losses.dtype)
    # Absent tasks have loss 1 and add nothing.
    logs = jnp.log(losses)
    limit = log_limit(losses.dtype)
    values = jnp.exp(jnp.clip(jnp.sum(logs) / count - logs, -limit, limit))
    return jnp.where(present, values / count, 0)


def gls(num_tasks: int) -> Balancer:
    """Minimise the geometric mean of the losses: `(prod_k L_k)^(1/K)`.

    With `M` that mean, `w_k = M / (K L_k)`: scaling one loss scales all gradients
    alike, so that the units of the losses do not matter. It is computed from
    logarithms: the product of the losses would overflow or vanish.

    A task whose loss is 0, negative or below the smallest normal number has no
    logarithm and counts as absent; with it the mean would be 0, and the other tasks
    would stop. Losses of any size are fine; weights are bounded by 1e38 in float32.

    Args:
        num_tasks: Number of tasks.

    Returns:
        A balancer without state; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Chennupati et al., MultiNet++: Multi-Stream Feature Aggregation and Geometric
        Loss Strategy for Multi-Task Learning, CVPR Workshops 2019,
        https://arxiv.org/abs/1904.08492.
    """

    def weigh(losses: Array, state: None, active: Array) -> tuple[Array, None]:
        return weights(losses, active), state

    return make_balancer(weigh, num_tasks)
