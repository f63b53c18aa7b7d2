"""Scale-invariant weighting: the sum of the logarithms of the losses."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import all_active
from mtl_jax.optim.balancer import Balancer, make_balancer, positive_losses


def weights(
    losses: Float[Array, " tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """`1 / L_k` for the tasks with a positive loss.

    Args:
        losses: Losses of all tasks.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the losses' dtype, 0 for absent tasks.
    """
    active = all_active(losses.shape[0]) if active is None else active
    losses, present = positive_losses(losses, active)
    return jnp.where(present, 1 / losses, 0)


def scale_invariant(num_tasks: int) -> Balancer:
    """Minimise the sum of the logarithms of the losses: `sum_k log L_k`.

    `w_k = 1 / L_k`: scaling a loss leaves its gradient in the sum as it was, so that
    the units of the losses do not matter.

    A task whose loss is 0, negative or below the smallest normal number has no
    logarithm and counts as absent. Losses of any size are fine.

    Args:
        num_tasks: Number of tasks.

    Returns:
        A balancer without state; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        The baseline of Navon et al., Multi-Task Learning as a Bargaining Game, ICML
        2022, https://arxiv.org/abs/2202.01017.
    """

    def weigh(losses: Array, state: None, active: Array) -> tuple[Array, None]:
        return weights(losses, active), state

    return make_balancer(weigh, num_tasks)
