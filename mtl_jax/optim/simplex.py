"""Task weights on a simplex, learned from gradients of independent batches."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    AggregatorState,
    accumulation_dtype,
    all_active,
    check_leading_axis,
    check_num_tasks,
    cross_gramian,
    like,
    make_aggregator,
    weighted_sum,
)


def project_simplex(
    values: Float[Array, " tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """The nearest point whose coordinates are nonnegative and sum to one.

    Args:
        values: The point to project.
        active: Which coordinates may be other than zero; all by default.

    Returns:
        The point; zero where no coordinate is active.

    References:
        Held et al., Validation of Subgradient Optimization, Mathematical Programming 6,
        1974.
    """
    active = all_active(len(values)) if active is None else active
    largest = jnp.max(jnp.where(active, values, -jnp.inf))
    # Shifting all coordinates changes nothing, and one that is less than the largest
    # by 1 or more becomes zero. So numbers stay small whatever the values are.
    shifted = jnp.maximum(values - jnp.where(jnp.any(active), largest, 0), -2)
    shifted = jnp.where(active, shifted, -2)
    ordered = jnp.sort(shifted, descending=True)
    counts = jnp.arange(1, len(values) + 1).astype(values.dtype)
    thresholds = (jnp.cumsum(ordered) - 1) / counts
    support = jnp.sum(ordered > thresholds)
    point = jnp.maximum(shifted - thresholds[support - 1], 0)
    return jnp.where(active, point, 0)


def restrict(
    point: Float[Array, " tasks"], active: Bool[Array, " tasks"]
) -> tuple[Float[Array, " tasks"], Float[Array, ""]]:
    """Scale the active coordinates of a point on the simplex to sum to one.

    Args:
        point: Nonnegative coordinates that sum to one over all tasks.
        active: Which tasks are present.

    Returns:
        `(restricted, share)`: what the active tasks held together is `share`, and
        `restricted` is 0 for the others, equal parts where the active held nothing.
    """
    held = jnp.where(active, point, 0)
    share = jnp.sum(held)
    equal = active.astype(point.dtype) / jnp.maximum(jnp.sum(active), 1).astype(
        point.dtype
    )
    return jnp.where(share > 0, held / jnp.where(share > 0, share, 1), equal), share


def from_cross_gramian(
    weights: Callable[[Array, Array, Array], tuple[Array, Array]], num_tasks: int
) -> Aggregator:
    """Make an aggregator of a function of the cross Gramian of two further batches.

    The update is `sum_k w_k g_k`, with weights that do not depend on the batch of the
    `g_k`: `w` comes from `cross_gramian(second, third)`, and the noise of the three
    batches is independent.

    Args:
        weights: Pure function `(cross_gramian [tasks, tasks], memory [tasks], active
            [tasks]) -> (weights, memory)`, where `memory` is a point on the simplex,
            equal parts at first.
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator as that of `from_weights`, whose `update` must be given the task
        gradients of two more batches, `second` and `third`, shaped like
        `task_gradients`.

    Raises:
        ValueError: If `num_tasks < 1`, or, from `update`, if a gradient's leading axis
            is not `num_tasks` or one of `second` and `third` is missing.
    """
    check_num_tasks(num_tasks)

    def init(params: optax.Params) -> AggregatorState:
        equal = jnp.full(num_tasks, 1 / num_tasks, accumulation_dtype(params))
        return AggregatorState(jnp.zeros_like(equal), None, equal)

    def update(
        task_gradients: PyTree,
        state: AggregatorState,
        params: optax.Params | None = None,
        *,
        losses: Float[Array, " tasks"] | None = None,
        active: Bool[Array, " tasks"] | None = None,
        second: PyTree | None = None,
        third: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, AggregatorState]:
        del params, losses, extra
        batches = {"task_gradients": task_gradients, "second": second, "third": third}
        for name, gradients in batches.items():
            if gradients is None:
                raise ValueError(
                    f"{name} is missing; this method needs the task gradients of three "
                    "independent batches, the first as task_gradients and the others "
                    "as second=... and third=..., of the same structure."
                )
            check_leading_axis(gradients, num_tasks, name)
        matrix = cross_gramian(second, third)
        active = all_active(num_tasks) if active is None else active
        values, memory = weights(matrix, state.memory.astype(matrix.dtype), active)
        new_state = AggregatorState(values, None, memory)
        return weighted_sum(task_gradients, values), like(new_state, state)

    return make_aggregator(init, update)
