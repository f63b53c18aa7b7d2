"""Equal weighting: the plain sum of the losses, the baseline."""

from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import all_active
from mtl_jax.optim.balancer import Balancer, make_balancer


def weights(
    losses: Float[Array, " tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Weight 1 for every active task, 0 for the others.

    Args:
        losses: Losses of all tasks; only their number and dtype matter.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the losses' dtype.
    """
    active = all_active(losses.shape[0]) if active is None else active
    return active.astype(losses.dtype)


def equal(num_tasks: int) -> Balancer:
    """Add up the losses: `sum_k L_k`.

    Any loss will do: 0, negative or huge.

    Args:
        num_tasks: Number of tasks.

    Returns:
        A balancer without state; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`.
    """

    def weigh(losses: Array, state: None, active: Array) -> tuple[Array, None]:
        return weights(losses, active), state

    return make_balancer(weigh, num_tasks)
