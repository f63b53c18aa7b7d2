"""DB-MTL: gradients of the log losses, averaged over steps, all of one length."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    accumulation_dtype,
    from_rows,
    like,
    weighted_sum,
)
from mtl_jax.optim.rows import along_tasks, row_norms, update_rows, zero_rows


class DBMTLMemory(NamedTuple):
    """What DB-MTL carries from step to step.

    Attributes:
        rows: Moving averages of the gradients of the log losses, `[tasks, *shape]`.
        counts: The number of steps in which each task has been active.
    """

    rows: PyTree[Float[Array, "tasks ..."]]
    counts: Int[Array, " tasks"]


def weights(
    norms: Float[Array, " tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Weights that make every gradient as long as the longest.

    Args:
        norms: Lengths of the (averaged) task gradients.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the dtype of the norms, 1 for the longest and more for the others, 0
        for inactive tasks and zero gradients.
    """
    norms = norms if active is None else jnp.where(active, norms, 0)
    return jnp.where(norms > 0, jnp.max(norms) / jnp.where(norms > 0, norms, 1), 0)


def db_mtl(num_tasks: int, *, beta: float = 0.9, sigma: float = 0.0) -> Aggregator:
    """Balance losses by their logarithm and gradients by their length.

    The gradient of `log L_k` is `g_k / L_k`; its average over the steps is
    `y_k ← g_k / L_k + β_t (y_k − g_k / L_k)`, from zero, with `β_t = beta / t^sigma`,
    `t` the number of steps in which the task has been active. Then
    `d = sum_k w_k y_k`, `w_k = max_j |y_j| / |y_k|`.

    Give the gradients and losses as they are: the logarithm is taken here, by the
    division, and must not be in the objective too. To measure a task's loss in another
    unit changes nothing. No constant is added to `L_k` (the paper adds 1e-8 inside the
    logarithm), so that this holds for the smallest losses too, and as in the logarithm
    itself `g_k / L_k` may grow without bound as `L_k` approaches 0. A loss that is not
    positive has no logarithm: its task is absent for the step.

    A task whose average is zero adds nothing; opposite averages cancel, whatever their
    lengths; duplicates count twice. An inactive task keeps its average. Cost: a copy of
    the task gradients in memory, float32 or wider, and two passes over it; one number a
    task is reduced.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        beta: Share of the average that is kept in the first step, in [0, 1).
        sigma: How fast that share decays with the number of steps.

    Returns:
        An aggregator that needs `losses`; see `from_rows`. Its state's memory is a
        `DBMTLMemory`.

    Raises:
        ValueError: If `num_tasks < 1`, `beta` is not in [0, 1) or `sigma < 0`.

    References:
        Lin et al., Dual-Balancing for Multi-Task Learning, 2023,
        https://arxiv.org/abs/2308.12029.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; pass 0 or more, and less than 1.")
    if sigma < 0:
        raise ValueError(f"sigma is {sigma}; pass 0 or more.")

    def memory(params: optax.Params) -> DBMTLMemory:
        return DBMTLMemory(
            zero_rows(params, num_tasks), jnp.zeros(num_tasks, jnp.int32)
        )

    def combine(
        task_gradients: PyTree,
        active: Bool[Array, " tasks"],
        memory: DBMTLMemory,
        losses: Float[Array, " tasks"],
    ) -> tuple[PyTree, DBMTLMemory]:
        dtype = accumulation_dtype(task_gradients)
        present = active & (losses > 0)
        losses = jnp.where(present, losses, 1).astype(dtype)
        counts = memory.counts + present.astype(jnp.int32)
        rates = beta / jnp.maximum(counts, 1).astype(dtype) ** sigma

        def average(row: Array, gradient: Array) -> Array:
            rate = along_tasks(rates, row).astype(row.dtype)
            gradient = gradient / along_tasks(losses, row).astype(row.dtype)
            return gradient + rate * (row - gradient)

        rows = update_rows(average, memory.rows, task_gradients, present)
        gradient = weighted_sum(rows, weights(row_norms(rows), present))
        return like(gradient, task_gradients), DBMTLMemory(rows, counts)

    return from_rows(combine, num_tasks, memory=memory, needs_losses=True)
