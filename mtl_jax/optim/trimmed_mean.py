"""Trimmed mean: average each coordinate without its most extreme entries."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    accumulation_dtype,
    all_active,
    from_rows,
)
from mtl_jax.optim.rows import along_tasks


def combine(
    task_gradients: PyTree,
    active: Bool[Array, " tasks"] | None = None,
    *,
    trim: int = 1,
) -> PyTree[Float[Array, "..."]]:
    """Mean of each coordinate's entries but the `trim` largest and `trim` smallest.

    Args:
        task_gradients: Pytree of leaves `[tasks, *shape]`, at least one.
        active: Which tasks are present; all by default.
        trim: How many entries to leave out at either end, as far as at least one, or
            two of an even number, remain.

    Returns:
        Pytree of leaves `[*shape]`, each of the dtype of its gradients, summed in
        float32 (float64 for float64 leaves); zero where no task is active.
    """
    num_tasks = jax.tree.leaves(task_gradients)[0].shape[0]
    active = all_active(num_tasks) if active is None else active
    count = jnp.sum(active, dtype=jnp.int32)
    cut = jnp.clip((count - 1) // 2, 0, trim)
    place = jnp.arange(num_tasks, dtype=jnp.int32)
    kept = (place >= cut) & (place < count - cut)
    remaining = jnp.maximum(count - 2 * cut, 1)

    def mean(leaf: Array) -> Array:
        dtype = accumulation_dtype(leaf)
        # Absent entries go behind all others, and count from there on no more.
        entries = jnp.where(along_tasks(active, leaf), leaf, jnp.inf)
        entries = jnp.sort(entries, axis=0).astype(dtype)
        entries = jnp.where(along_tasks(kept, leaf), entries, 0)
        total = jnp.sum(entries, axis=0)
        return (total / remaining.astype(dtype)).astype(leaf.dtype)

    return jax.tree.map(mean, task_gradients)


def trimmed_mean(num_tasks: int, *, trim: int = 1) -> Aggregator:
    """Average the task gradients, each coordinate without its extremes.

    In every coordinate the `trim` largest and the `trim` smallest entries of the tasks
    are left out and the others averaged, so that up to `trim` tasks can do no harm,
    whatever their gradients are. `trim = 0` gives the mean. Where `2 trim` is no less
    than the number of active tasks, one entry remains, or the middle two of an even
    number: the median. For one or two tasks that is their mean.

    Opposite gradients beside others are the first to be trimmed, a zero gradient counts
    as an entry between the signs, and duplicates shield each other. Coordinates are
    treated apart: `d` need not lie in the span of the task gradients, and may conflict
    with some. Cost: a sort over tasks of every coordinate; no inner products, and
    nothing is communicated.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        trim: How many entries to leave out at either end.

    Returns:
        An aggregator; see `from_rows`.

    Raises:
        ValueError: If `num_tasks < 1` or `trim < 0`.

    References:
        Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical
        Rates, ICML 2018, https://arxiv.org/abs/1803.01498.
    """
    if trim < 0:
        raise ValueError(f"trim is {trim}; pass 0 or more.")

    return from_rows(functools.partial(combine, trim=trim), num_tasks)
