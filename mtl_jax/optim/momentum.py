"""CR-MOGM: average the weights of a method over the steps."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    all_active,
    make_aggregator,
    weighted_sum,
)


class MomentumState(NamedTuple):
    """State of `momentum`.

    Attributes:
        weights: The weights of the latest update, zeros before the first.
        average: The average of each task, unmasked.
        seen: Which tasks have been active, and so have an average.
        inner: State of the aggregator within.
    """

    weights: Float[Array, " tasks"]
    average: Float[Array, " tasks"]
    seen: Bool[Array, " tasks"]
    inner: PyTree


def momentum(aggregator: Aggregator, decay: float = 0.9) -> Aggregator:
    """Average the weights of an aggregator exponentially over the steps.

    `d = sum_k w_k g_k` with `w_t = decay w_{t−1} + (1 − decay) ŵ_t`, where `ŵ_t` are
    the weights that the aggregator finds in step `t`. On gradients of small batches the
    weights of a method depend on the same noise as the gradients they multiply, which
    biases the direction; averaged weights hardly do.

    A task's average starts at its first `ŵ` (the paper starts all at `1/K`, which is
    foreign to weights that do not sum to one), so that `w` keeps the scale of the
    method from the first step on, and weights that never change stay as they are. An
    inactive task has weight 0 in the step and keeps its average for later.

    Guarantees that hold step by step, such as that of no conflict, hold only nearly.
    Zero, opposite and duplicate gradients have the averages of their weights; `d` need
    not vanish where that of the aggregator does. Cost: that of the aggregator, whose
    own direction is compiled away.

    Args:
        aggregator: A method that weighs tasks: its state has `weights`, and its
            direction is `sum_k weights[k] * g_k`.
        decay: How much of the average is kept in each step, in [0, 1).

    Returns:
        An aggregator whose state is a `MomentumState`. Keywords of its `update` are
        passed on.

    Raises:
        ValueError: If `decay` is not in [0, 1).
        TypeError: From `init`, if the aggregator has no weights.

    References:
        Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient
        Manipulation and Beyond, NeurIPS 2022, https://proceedings.neurips.cc/
        paper_files/paper/2022/file/f91bd64a3620aad8e70a27ad9cb3ca57-Paper-Conference.pdf
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; pass 0 or more and less than 1.")

    def init(params: optax.Params) -> MomentumState:
        inner = aggregator.init(params)
        current = weights_in(inner)
        # Two arrays: a buffer that is there twice cannot be donated.
        zeros = jnp.zeros_like(current), jnp.zeros_like(current)
        return MomentumState(*zeros, jnp.zeros(current.shape, bool), inner)

    def update(
        task_gradients: PyTree,
        state: MomentumState,
        params: optax.Params | None = None,
        *,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MomentumState]:
        active = all_active(len(state.weights)) if active is None else active
        # This direction is not used, so that under jit only its weights are computed.
        _, inner = aggregator.update(
            task_gradients, state.inner, params, active=active, **extra
        )
        found = weights_in(inner)
        moved = decay * state.average + (1 - decay) * found
        moved = jnp.where(state.seen, moved, found)
        average = jnp.where(active, moved, state.average)
        weights = jnp.where(active, average, 0)
        new_state = MomentumState(weights, average, state.seen | active, inner)
        return weighted_sum(task_gradients, weights), new_state

    return make_aggregator(init, update)


def weights_in(state: PyTree) -> Float[Array, " tasks"]:
    """The weights in an aggregator's state; raise TypeError where there are none."""
    weights = getattr(state, "weights", None)
    if weights is None:
        raise TypeError(
            "This combinator needs an aggregator that gives each task one weight, but "
            f"the state of the one it was given ({type(state).__name__}) has no "
            "`weights`: the aggregator works on the rows, on groups of parameters, or "
            "transforms its result. Put the combinator inside `grouped`, `where` or "
            "`chain_after`, not around them."
        )
    return weights
