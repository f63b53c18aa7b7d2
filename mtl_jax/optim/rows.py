"""Task gradients that a method remembers, as leaves `[tasks, *shape]`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import accumulation_dtype


def zero_rows(params: optax.Params, num_tasks: int) -> PyTree:
    """One row of zeros a task, for each parameter.

    Rows are float32 (float64 for float64 leaves) even where the parameters are
    bfloat16: sums and averages over many steps would come to a halt in it.

    Args:
        params: Pytree of leaves `[*shape]`.
        num_tasks: Number of tasks.

    Returns:
        The same tree with leaves `[num_tasks, *shape]`. Outside `jax.jit` they are
        sharded as the parameters; inside, `out_shardings` decides.
    """

    def zeros(leaf: Array) -> Array:
        row = jnp.zeros_like(leaf, dtype=accumulation_dtype(leaf))
        return jnp.broadcast_to(row[None], (num_tasks, *leaf.shape))

    return jax.tree.map(zeros, params)


def update_rows(
    update: Callable[[Array, Array], Array],
    rows: PyTree,
    task_gradients: PyTree,
    active: Bool[Array, " tasks"],
) -> PyTree:
    """Update the remembered rows of active tasks, and leave the others as they are.

    Args:
        update: `(row, gradient) -> row` for leaves `[tasks, *shape]`, both in the dtype
            of the row.
        rows: Pytree of leaves `[tasks, *shape]`.
        task_gradients: Pytree of the same structure and shapes.
        active: Which tasks are present.

    Returns:
        The new rows, bit for bit the old ones where a task is absent.

    Raises:
        ValueError: If structures or shapes differ.
    """
    if _description(rows) != _description(task_gradients):
        raise ValueError(
            "The task gradients differ in structure or shapes from those remembered: "
            "this method follows each parameter's gradients over the steps. Call init "
            "with the parameters that the gradients are taken at; gradients at "
            "features belong to one batch and cannot be followed."
        )

    def leaf(row: Array, gradient: Array) -> Array:
        updated = update(row, gradient.astype(row.dtype))
        return jnp.where(along_tasks(active, row), updated, row)

    return jax.tree.map(leaf, rows, task_gradients)


def row_norms(rows: PyTree) -> Float[Array, " tasks"]:
    """Euclidean length of each task's row over all leaves.

    Args:
        rows: Pytree of leaves `[tasks, *shape]`, at least one.

    Returns:
        Lengths, float64 if any leaf is float64 and float32 otherwise. Under sharding
        one number a task and leaf is reduced.
    """
    return jnp.sqrt(sum_rows(jax.tree.map(lambda leaf: leaf**2, rows)))


def sum_rows(rows: PyTree) -> Float[Array, " tasks"]:
    """Sum of each task's row over all coordinates of all leaves.

    Args:
        rows: Pytree of leaves `[tasks, *shape]`, at least one.

    Returns:
        Sums, float64 if any leaf is float64 and float32 otherwise.
    """
    dtype = accumulation_dtype(rows)
    sums = [
        jnp.sum(leaf.astype(dtype), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(rows)
    ]
    return jnp.sum(jnp.stack(sums), axis=0)


def along_tasks(values: Array, leaf: Array) -> Array:
    """Shape one value a task so that it meets every coordinate of its row in a leaf."""
    return values.reshape((-1,) + (1,) * (leaf.ndim - 1))


def _description(tree: PyTree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [leaf.shape for leaf in leaves]
