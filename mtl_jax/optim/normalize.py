"""Divide task gradients by their norms or losses before they are aggregated."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    accumulation_dtype,
    all_active,
    check_losses,
    make_aggregator,
    weighted_sum,
)
from mtl_jax.optim.grouped import count_tasks
from mtl_jax.optim.momentum import weights_in

Kind = Literal["none", "l2", "loss", "loss+"]
ApplyTo = Literal["normalized", "raw"]


class NormalizeState(NamedTuple):
    """State of `normalize`.

    Attributes:
        weights: The factors of the given gradients in the latest direction, zeros
            before the first; None if the aggregator has no weights.
        inner: State of the aggregator within; its weights are those it found.
    """

    weights: Float[Array, " tasks"] | None
    inner: PyTree


def normalize(
    aggregator: Aggregator, kind: Kind, *, apply_to: ApplyTo = "normalized"
) -> Aggregator:
    """Give an aggregator the gradients `g_k / n_k`.

    The kinds are those of MGDA's code, where the choice decides the result, as the
    shortest vector in the hull of raw gradients is close to the smallest of them:

        none    n_k = 1
        l2      n_k = |g_k|
        loss    n_k = |L_k|
        loss+   n_k = |L_k| |g_k|

    The authors apply the weights found to the raw gradients, `d = sum_k w_k g_k`;
    LibMTL applies them to the normalised ones, `d = sum_k w_k g_k / n_k`.

    Where `n_k` is zero, the largest of the active tasks takes its place: a zero
    gradient stays zero, and that of a task without any loss is not blown up. If all are
    zero nothing is divided. To give one task's loss another unit changes its
    `g_k / n_k` under `loss+` alone. Under `l2` opposite gradients become equally long,
    so that they cancel; duplicates stay so where their losses are equal. Cost: that of
    the aggregator, and a scaled copy of the task gradients.

    Keyword arguments with the structure and shapes of `task_gradients`, such as the
    gradients of a second batch, are divided by the same `n`.

    Args:
        aggregator: Takes the normalised gradients. Losses are handed to it as they are.
        kind: What to divide by. `none` gives the aggregator back; `loss` and `loss+`
            need `losses`.
        apply_to: What the weights found are applied to. `"raw"` needs an aggregator
            that weighs tasks.

    Returns:
        An aggregator whose state is a `NormalizeState`.

    Raises:
        ValueError: If `kind` or `apply_to` is none of the above, or, from `update`, if
            the kind needs losses and there are none.
        TypeError: From `init`, if `apply_to` is `"raw"` and the aggregator has no
            weights.

    References:
        Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization,
        NeurIPS 2018, https://arxiv.org/abs/1810.04650.
    """
    for name, value, choices in (("kind", kind, Kind), ("apply_to", apply_to, ApplyTo)):
        if value not in get_args(choices):
            raise ValueError(f"{name} is {value!r}; pass one of {get_args(choices)}.")
    if kind == "none":
        return aggregator

    def init(params: optax.Params) -> NormalizeState:
        inner = aggregator.init(params)
        if apply_to == "raw":
            weights_in(inner)
        weights = getattr(inner, "weights", None)
        return NormalizeState(
            None if weights is None else jnp.zeros_like(weights), inner
        )

    def update(
        task_gradients: PyTree,
        state: NormalizeState,
        params: optax.Params | None = None,
        *,
        losses: Float[Array, " tasks"] | None = None,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, NormalizeState]:
        num_tasks = count_tasks(task_gradients)
        active = all_active(num_tasks) if active is None else active
        divisors = jnp.ones(num_tasks, accumulation_dtype(task_gradients))
        if kind != "loss":
            divisors *= _norms(task_gradients)
        if kind != "l2":
            losses = check_losses(losses, num_tasks)
            divisors *= jnp.abs(losses.astype(divisors.dtype))
        divisors = _safe(divisors, active)

        example = _description(task_gradients)
        extra = {
            name: _divide(value, divisors) if _description(value) == example else value
            for name, value in extra.items()
        }
        gradient, inner = aggregator.update(
            _divide(task_gradients, divisors),
            state.inner,
            params,
            losses=losses,
            active=active,
            **extra,
        )
        if state.weights is None:
            return gradient, NormalizeState(None, inner)
        weights = weights_in(inner)
        if apply_to == "normalized":
            weights = weights / divisors.astype(weights.dtype)
        # Equals the aggregator's own direction where that is asked for, and does not
        # read the scaled copy again.
        return weighted_sum(task_gradients, weights), NormalizeState(weights, inner)

    return make_aggregator(init, update)


def _norms(task_gradients: PyTree) -> Float[Array, " tasks"]:
    dtype = accumulation_dtype(task_gradients)

    def squares(leaf: Array) -> Array:
        wide = leaf.astype(dtype)
        return jnp.sum(wide * wide, axis=tuple(range(1, leaf.ndim)))

    return jnp.sqrt(sum(squares(leaf) for leaf in jax.tree.leaves(task_gradients)))


def _safe(divisors: Array, active: Array) -> Float[Array, " tasks"]:
    """Replace zeros by the largest, and by 1 where there is none or no task."""
    # Absent tasks may have any loss, even NaN.
    divisors = jnp.where(active, divisors, 0)
    largest = jnp.max(divisors)
    divisors = jnp.where(divisors > 0, divisors, largest)
    return jnp.where(active & (largest > 0), divisors, 1)


def _divide(task_gradients: PyTree, divisors: Array) -> PyTree:
    def divide(leaf: Array) -> Array:
        divisor = divisors.reshape((-1,) + (1,) * (leaf.ndim - 1))
        return (leaf.astype(divisor.dtype) / divisor).astype(leaf.dtype)

    return jax.tree.map(divide, task_gradients)


def _description(tree: PyTree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [getattr(leaf, "shape", None) for leaf in leaves]
