"""MoCo: track each task's gradient over steps, and its weight by small steps."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    accumulation_dtype,
    all_active,
    from_rows,
    gramian,
    like,
    weighted_sum,
)
from mtl_jax.optim.balancer import softmax_weights
from mtl_jax.optim.nonnegative import precise_matmul
from mtl_jax.optim.rows import along_tasks, row_norms, update_rows, zero_rows


class MoCoMemory(NamedTuple):
    """What MoCo carries from step to step.

    Attributes:
        rows: The tracked gradients, `[tasks, *shape]`.
        counts: The number of steps in which each task has been active.
        weights: The weights, which sum to 1 over all tasks.
        steps: The number of steps in which any task has been active.
    """

    rows: PyTree[Float[Array, "tasks ..."]]
    counts: Int[Array, " tasks"]
    weights: Float[Array, " tasks"]
    steps: Int[Array, ""]


def weights(
    gramian: Float[Array, "tasks tasks"],
    previous: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    step_size: float | Float[Array, ""],
    rho: float = 0.0,
) -> Float[Array, " tasks"]:
    """One step from the previous weights towards those of the shortest combination.

    Args:
        gramian: Inner products of the tracked gradients.
        previous: The weights to start from, of which the shares of the active tasks
            count.
        active: Which tasks are present; all by default.
        step_size: How far to go.
        rho: Strength of the pull towards equal weights.

    Returns:
        Weights of the Gramian's dtype, nonnegative, summing to 1 over the active tasks,
        0 for the others.
    """
    active = all_active(gramian.shape[0]) if active is None else active
    previous = jnp.where(active, previous.astype(gramian.dtype), 0)
    mass = jnp.sum(previous)
    count = jnp.maximum(jnp.sum(active), 1).astype(gramian.dtype)
    # Weights that have all come down to zero start again as equals.
    start = jnp.where(mass > 0, previous / jnp.where(mass > 0, mass, 1), 1 / count)
    start = jnp.where(active, start, 0)
    slope = precise_matmul(gramian, start) + rho * start
    return softmax_weights(start - step_size * slope, active)


def moco(
    num_tasks: int,
    *,
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
) -> Aggregator:
    """Step towards the min-norm combination of gradients tracked over steps.

    Every gradient is given the length of its loss and tracked from zero,
    `y_k ← y_k + β_t (L_k g_k / |g_k| − y_k)`; the weights, equal at first, take one
    step `λ ← softmax(λ − γ_t (Y Yᵀ + ρ I) λ)`; and `d = sum_k λ_k y_k`. Here
    `β_t = beta / t^beta_sigma` and `γ_t = gamma / t^gamma_sigma`. Solving for the
    min-norm weights of each batch anew, as MGDA does, is biased by the noise of the
    batch; tracked gradients have less and less of it.

    This is the form of the authors' code: the paper itself tracks `g_k` unscaled and
    projects `λ` onto the simplex. The softmax of weights in [0, 1] stays close to equal
    weights unless `γ_t Y Yᵀ λ` is of order one. Whatever the scale of a gradient, `d`
    is the same; that of the losses sets the length of `d` and how far `λ` moves.

    A zero gradient, or a loss that is not positive (it would turn the gradient round),
    draws `y_k` towards zero, and so weight towards the task. Opposite gradients of
    equal loss cancel; duplicates share their weight. An inactive task keeps its `y_k`
    and its own `t`, and those active divide up the weight they have together as if
    there were no other. Cost: a copy of the task gradients in memory, float32 or wider,
    its Gramian, and two passes over it; `tasks²` numbers are reduced.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        beta: Step size of the tracked gradients in the first step, in (0, 1].
        beta_sigma: How fast it decays with the number of steps of the task.
        gamma: Step size of the weights in the first step.
        gamma_sigma: How fast it decays with the number of steps.
        rho: Strength of the pull towards equal weights.

    Returns:
        An aggregator that needs `losses`; see `from_rows`. Its state's memory is a
        `MoCoMemory`.

    Raises:
        ValueError: If `num_tasks < 1`, `beta` is not in (0, 1], or another number is
            negative.

    References:
        Fernando et al., Mitigating Gradient Bias in Multi-objective Learning: A
        Provably Convergent Approach, ICLR 2023, https://arxiv.org/abs/2210.12624.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta is {beta}; pass more than 0, and 1 or less.")
    for name, value in (
        ("beta_sigma", beta_sigma),
        ("gamma", gamma),
        ("gamma_sigma", gamma_sigma),
        ("rho", rho),
    ):
        if value < 0:
            raise ValueError(f"{name} is {value}; pass 0 or more.")

    def memory(params: optax.Params) -> MoCoMemory:
        equal = jnp.full(num_tasks, 1 / num_tasks, accumulation_dtype(params))
        return MoCoMemory(
            rows=zero_rows(params, num_tasks),
            counts=jnp.zeros(num_tasks, jnp.int32),
            weights=equal,
            steps=jnp.zeros((), jnp.int32),
        )

    def combine(
        task_gradients: PyTree,
        active: Bool[Array, " tasks"],
        memory: MoCoMemory,
        losses: Float[Array, " tasks"],
    ) -> tuple[PyTree, MoCoMemory]:
        counts = memory.counts + active.astype(jnp.int32)
        steps = memory.steps + jnp.any(active).astype(jnp.int32)
        norms = row_norms(task_gradients)
        lengths = jnp.maximum(losses.astype(norms.dtype), 0)
        scales = jnp.where(norms > 0, lengths / jnp.where(norms > 0, norms, 1), 0)
        rates = beta / jnp.maximum(counts, 1).astype(norms.dtype) ** beta_sigma

        def track(row: Array, gradient: Array) -> Array:
            scale = along_tasks(scales, row).astype(row.dtype)
            rate = along_tasks(rates, row).astype(row.dtype)
            return row + rate * (scale * gradient - row)

        rows = update_rows(track, memory.rows, task_gradients, active)
        step_size = gamma / jnp.maximum(steps, 1).astype(norms.dtype) ** gamma_sigma
        values = weights(
            gramian(rows), memory.weights, active, step_size=step_size, rho=rho
        )
        mass = jnp.sum(jnp.where(active, memory.weights, 0))
        kept = jnp.where(active, mass * values.astype(mass.dtype), memory.weights)
        gradient = like(weighted_sum(rows, values), task_gradients)
        return gradient, MoCoMemory(rows, counts, kept, steps)

    return from_rows(combine, num_tasks, memory=memory, needs_losses=True)
