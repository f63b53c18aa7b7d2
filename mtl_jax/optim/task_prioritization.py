"""Dynamic task prioritization: a focal weight for each task that is hard so far."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import all_active
from mtl_jax.optim.balancer import Balancer, make_balancer


class PriorityState(NamedTuple):
    """How well each task goes.

    Attributes:
        performance: Moving average in [0, 1] of each task's performance.
        seen: Whether the task has been active yet.
    """

    performance: Float[Array, " tasks"]
    seen: Bool[Array, " tasks"]


def weights(
    performance: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    gamma: float = 1.0,
) -> Float[Array, " tasks"]:
    """`-(1 - κ_k)^gamma log κ_k`, the focal loss of each task's performance `κ_k`.

    Args:
        performance: A measure of each task in [0, 1], the higher the better.
        active: Which tasks are present; all by default.
        gamma: The larger, the less the tasks that go well.

    Returns:
        Weights of the performance's dtype, 0 for inactive tasks.
    """
    active = all_active(performance.shape[0]) if active is None else active
    logs = jnp.log(jnp.maximum(performance, jnp.finfo(performance.dtype).tiny))
    values = (1 - performance) ** jnp.asarray(gamma, performance.dtype) * -logs
    return jnp.where(active, values, 0)


def task_prioritization(
    num_tasks: int, *, gamma: float = 1.0, decay: float = 0.9
) -> Balancer:
    """Weigh each task by how far it is from being solved, for classification losses.

    `w_k = -(1 - κ_k)^gamma log κ_k`, constants of the backward pass, with `κ_k` a
    moving average of the task's performance that includes the present step and begins
    with the first. The paper leaves the measure of performance to the user; here it is
    `exp(-L_k)`, which for a mean cross-entropy is the geometric mean of the
    probabilities given to the true labels. The weights depend on the unit of the loss,
    and mean nothing for losses that are no negative log likelihoods. For another
    measure keep its average yourself and use `weights`.

    A loss of 0 or less counts as performance 1: a task that stays there has weight 0.
    The weight of a huge loss is bounded, by 87 in float32. The sum of the weights is
    not fixed: it shrinks as the tasks are learned.

    Args:
        num_tasks: Number of tasks.
        gamma: The larger, the less the tasks that go well.
        decay: Share of the moving average kept each step.

    Returns:
        A balancer whose state is a `PriorityState`; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`, `gamma < 0`, or not `0 <= decay < 1`.

    References:
        Guo et al., Dynamic Task Prioritization for Multitask Learning, ECCV 2018,
        https://doi.org/10.1007/978-3-030-01270-0_17.
    """
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; pass 0 or more.")
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; pass a number in [0, 1).")

    def init() -> PriorityState:
        return PriorityState(jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool))

    def weigh(
        losses: Array, state: PriorityState, active: Array
    ) -> tuple[Array, PriorityState]:
        present = jnp.exp(-jnp.maximum(losses, 0))
        average = decay * state.performance + (1 - decay) * present
        average = jnp.where(state.seen, average, present)
        performance = jnp.where(active, average, state.performance)
        values = weights(performance, active, gamma=gamma)
        return values, PriorityState(performance, state.seen | active)

    return make_balancer(weigh, num_tasks, init=init)
