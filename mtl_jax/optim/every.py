"""Refresh the weights of a method every few steps, and keep them in between."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    all_active,
    make_aggregator,
    weighted_sum,
)
from mtl_jax.optim.momentum import weights_in


class EveryState(NamedTuple):
    """State of `every`.

    Attributes:
        weights: The weights of the latest update, zeros before the first.
        latest: The weight that each task was last given, unmasked.
        ages: How many steps ago that was; `n` where it was longer ago, or never.
        inner: State of the aggregator within.
    """

    weights: Float[Array, " tasks"]
    latest: Float[Array, " tasks"]
    ages: Int[Array, " tasks"]
    inner: PyTree


def every(aggregator: Aggregator, n: int) -> Aggregator:
    """Ask an aggregator for weights every `n` steps, and use them until then.

    `d = sum_k w_k g_k`, with `w` those of the latest refresh. The Gramian and the
    solver run in the refreshing steps alone; so do the aggregator's random draws and
    its memory, which therefore count refreshes, not steps.

    If all tasks are always active, the refreshes are in steps `0, n, 2n, ...`. In
    general no weight is used that is `n` or more steps old: a step refreshes where an
    active task has such a weight or none yet. A task that returns earlier gets its last
    weight; one that is inactive has weight 0. Hence a task that happens to be absent
    from every `n`-th batch is weighed all the same, at the cost of up to one refresh a
    task every `n` steps.

    Zero, opposite and duplicate gradients are treated as by the aggregator in the
    refreshing steps; in others `d` is no more than the old mixture. Cost: that of the
    aggregator in a refreshing step, that of a plain sum in others (under `jax.vmap`
    always the former).

    Args:
        aggregator: A method that weighs tasks: its state has `weights`, and its
            direction is `sum_k weights[k] * g_k`.
        n: Number of steps for which weights are used.

    Returns:
        An aggregator whose state is an `EveryState`. Keywords of its `update` are
        passed on.

    Raises:
        ValueError: If `n < 1`.
        TypeError: From `init`, if the aggregator has no weights.

    References:
        Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022,
        https://arxiv.org/abs/2202.01017.
    """
    if n < 1:
        raise ValueError(f"n is {n}; pass 1 or more.")

    def init(params: optax.Params) -> EveryState:
        inner = aggregator.init(params)
        current = weights_in(inner)
        # Two arrays: a buffer that is there twice cannot be donated.
        zeros = jnp.zeros_like(current), jnp.zeros_like(current)
        return EveryState(*zeros, jnp.full(current.shape, n, jnp.int32), inner)

    def update(
        task_gradients: PyTree,
        state: EveryState,
        params: optax.Params | None = None,
        *,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, EveryState]:
        active = all_active(len(state.weights)) if active is None else active

        def refreshed() -> tuple[Array, PyTree]:
            _, inner = aggregator.update(
                task_gradients, state.inner, params, active=active, **extra
            )
            return jnp.where(active, weights_in(inner), state.latest), inner

        def kept() -> tuple[Array, PyTree]:
            return state.latest, state.inner

        refresh = jnp.any(active & (state.ages >= n))
        latest, inner = jax.lax.cond(refresh, refreshed, kept)
        ages = jnp.where(refresh & active, 1, jnp.minimum(state.ages + 1, n))
        weights = jnp.where(active, latest, 0)
        new_state = EveryState(weights, latest, ages, inner)
        return weighted_sum(task_gradients, weights), new_state

    return make_aggregator(init, update)
