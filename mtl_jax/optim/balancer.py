"""The balancing protocol: weights from losses, for one backward pass in all.

A balancer never sees a gradient. The training step asks it for weights, takes the
gradient of `sum_k w_k L_k`, and is done: the cost is that of a plain sum whatever the
number of tasks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    accumulation_dtype,
    all_active,
    check_leading_axis,
    check_losses,
    check_num_tasks,
    make_aggregator,
    weighted_sum,
)


class Balancer(NamedTuple):
    """Two or three pure functions that weigh losses.

    Attributes:
        init: `() -> state`, a pytree of arrays.
        weights: `(losses [tasks], state, active [tasks] or None) -> (weights [tasks],
            state)`. The weights are constants to differentiate `sum_k w_k L_k` with,
            0 for inactive tasks; parameters that the method learns are updated in the
            state.
        observe: `(losses [tasks], state, active) -> state` for methods that must see
            the losses of the same batch again once the model has been updated; None
            for all others.
    """

    init: Callable[[], PyTree]
    weights: Callable[..., tuple[Float[Array, " tasks"], PyTree]]
    observe: Callable[..., PyTree] | None = None


class BalancerState(NamedTuple):
    """State of an aggregator made of a balancer.

    Attributes:
        weights: The weights of the latest update, zeros before the first.
        memory: State of the balancer.
    """

    weights: Float[Array, " tasks"]
    memory: PyTree


def make_balancer(
    weights: Callable[..., Any],
    num_tasks: int,
    *,
    init: Callable[[], PyTree] = lambda: None,
    observe: Callable[..., PyTree] | None = None,
) -> Balancer:
    """Make a balancer of a function of losses in float32 and a mask.

    Args:
        weights: `(losses, state, active) -> (weights, state)`.
        num_tasks: Number of tasks.
        init: Makes the first state; None by default.
        observe: `(losses, state, active) -> state`, see `Balancer`.

    Returns:
        The balancer. Its functions check the shape of the losses, take them as finite
        constants, float32 (float64 if they are), 0 for inactive tasks, and `active` as
        all by default. They are given the state's floats in the type of the losses and
        return them in their own, so that a state keeps its types whatever the losses
        are.

    Raises:
        ValueError: If `num_tasks < 1`, or, from its functions, if the losses are not
            `[num_tasks]`.
    """
    check_num_tasks(num_tasks)

    def prepare(losses: Array, active: Array | None) -> tuple[Array, Array]:
        losses = check_losses(losses, num_tasks)
        losses = losses.astype(accumulation_dtype(losses))
        active = all_active(num_tasks) if active is None else active
        # The largest number for infinity, whose differences and quotients are NaN.
        limit = jnp.finfo(losses.dtype).max
        return jnp.where(active, jnp.clip(losses, -limit, limit), 0), active

    def weigh(losses, state, active=None):
        losses, active = prepare(losses, active)
        values, carried = weights(losses, _with_floats(state, losses.dtype), active)
        return values, _with_floats_of(carried, state)

    def watch(losses, state, active=None):
        assert observe is not None
        losses, active = prepare(losses, active)
        carried = observe(losses, _with_floats(state, losses.dtype), active)
        return _with_floats_of(carried, state)

    return Balancer(init, weigh, None if observe is None else watch)


def from_balancer(balancer: Balancer, num_tasks: int) -> Aggregator:
    """Use a balancer where task gradients are at hand.

    For a training step that takes task gradients anyway, to log their angles or to
    compare with methods that need them. `update` must be given `losses`; `observe` is
    left to the caller, on the state's `memory`.

    Args:
        balancer: Weighs tasks by their losses.
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator whose update is `sum_k w_k g_k` and whose state is a
        `BalancerState`.

    Raises:
        ValueError: If `num_tasks < 1`, or, from `update`, if there are no losses.
    """
    check_num_tasks(num_tasks)

    def init(params: optax.Params) -> BalancerState:
        del params
        return BalancerState(jnp.zeros(num_tasks), balancer.init())

    def update(
        task_gradients: PyTree,
        state: BalancerState,
        params: optax.Params | None = None,
        *,
        losses: Float[Array, " tasks"] | None = None,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, BalancerState]:
        del params, extra
        check_leading_axis(task_gradients, num_tasks)
        losses = check_losses(losses, num_tasks)
        weights, memory = balancer.weights(losses, state.memory, active)
        gradient = weighted_sum(task_gradients, weights)
        return gradient, BalancerState(weights.astype(state.weights.dtype), memory)

    return make_aggregator(init, update)


def softmax_weights(
    logits: Float[Array, " tasks"], active: Bool[Array, " tasks"]
) -> Float[Array, " tasks"]:
    """Softmax over the active tasks, 0 for the others and where none is active."""
    values = jax.nn.softmax(jnp.where(active, logits, -jnp.inf))
    return jnp.where(active, values, 0)


def positive_losses(
    losses: Float[Array, " tasks"], active: Bool[Array, " tasks"]
) -> tuple[Float[Array, " tasks"], Bool[Array, " tasks"]]:
    """Losses that have a logarithm and a reciprocal, and which of them are real.

    Methods that divide by a loss would give a task that is solved an infinite weight,
    and a cross-entropy in float32 is exactly 0 long before its gradient is. Such a task
    counts as absent for the step.

    Args:
        losses: Finite losses of all tasks.
        active: Which tasks are present.

    Returns:
        `(losses, present)`. `present` are the active tasks whose loss is positive: at
        least the smallest normal number. The losses of all others are 1.
    """
    present = active & (losses >= jnp.finfo(losses.dtype).tiny)
    return jnp.where(present, losses, 1), present


def log_limit(dtype: jnp.dtype) -> float:
    """Bound of exponents `x` such that `exp(x)` and `exp(-x)` are normal numbers."""
    return -math.log(jnp.finfo(dtype).tiny)


def _with_floats(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if _is_float(leaf) else leaf, tree
    )


def _with_floats_of(tree: PyTree, example: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, other: leaf.astype(other.dtype) if _is_float(leaf) else leaf,
        tree,
        example,
    )


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
