"""ExcessMTL: more weight for tasks that are farther from convergence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    accumulation_dtype,
    all_active,
    from_rows,
    weighted_sum,
)
from mtl_jax.optim.balancer import softmax_weights
from mtl_jax.optim.rows import sum_rows, update_rows, zero_rows


class ExcessMTLMemory(NamedTuple):
    """What ExcessMTL carries from step to step.

    Attributes:
        squares: Sums of the squared gradients, `[tasks, *shape]`.
        baseline: Each task's first excess risk that is not zero, zero before.
        log_weights: Logarithms of the weights, which sum to `tasks` over all tasks.
    """

    squares: PyTree[Float[Array, "tasks ..."]]
    baseline: Float[Array, " tasks"]
    log_weights: Float[Array, " tasks"]


def excess_risks(task_gradients: PyTree, squares: PyTree) -> Float[Array, " tasks"]:
    """Estimate how far each loss is above its minimum: `sum_p g_p² / sqrt(S_p)`.

    Twice the fall of a quadratic model whose Hessian is diagonal, as AdaGrad has it.

    Args:
        task_gradients: Pytree of leaves `[tasks, *shape]`.
        squares: Sums of the squared gradients so far, this one included.

    Returns:
        One number a task; coordinates without any gradient so far add nothing.
    """

    def fall(gradient: Array, square: Array) -> Array:
        gradient = gradient.astype(square.dtype)
        root = jnp.sqrt(jnp.where(square > 0, square, 1))
        return jnp.where(square > 0, gradient**2 / root, 0)

    return sum_rows(jax.tree.map(fall, task_gradients, squares))


def weights(
    log_weights: Float[Array, " tasks"],
    ratios: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    learning_rate: float = 1e-2,
) -> tuple[Float[Array, " tasks"], Float[Array, " tasks"]]:
    """One step of exponentiated gradient ascent on the excess risks.

    Args:
        log_weights: Logarithms of the weights to start from.
        ratios: Excess risk of each task relative to its baseline.
        active: Which tasks are present; all by default.
        learning_rate: Step size.

    Returns:
        `(weights, log_weights)`: weights that sum to the number of active tasks, 0 for
        the others; and the logarithms to go on from, in which the active tasks have
        the same total as before and the others what they had.
    """
    active = all_active(log_weights.shape[0]) if active is None else active
    logits = jnp.where(active, log_weights + learning_rate * ratios, -jnp.inf)
    total = logsumexp(jnp.where(active, log_weights, -jnp.inf))
    moved = jnp.where(active, logits - logsumexp(logits) + total, log_weights)
    count = jnp.sum(active).astype(logits.dtype)
    return count * softmax_weights(logits, active), moved


def excess_mtl(num_tasks: int, *, learning_rate: float = 1e-2) -> Aggregator:
    """Weigh tasks by how far they are from convergence, not by their losses.

    The excess risk, what a loss could still fall, is estimated from the gradient
    alone: with `S_k ← S_k + g_k²` by coordinate, `e_k = sum_p g_kp² / sqrt(S_kp)`. The
    weights, 1 at first, move by `w_k ← w_k exp(learning_rate e_k / e_k⁰)`, `e_k⁰` the
    task's first excess risk, and are scaled to sum to the number of tasks;
    `d = sum_k w_k g_k`. A task whose labels are noise has a large loss that cannot
    fall, and does not gain weight by it.

    The first step is the plain sum if no gradient is zero. To measure a task's loss in
    another unit changes its share of `d`, but no weight. A zero gradient adds nothing,
    and its task loses weight; a task that begins with zero gradients takes its first
    other one as `e_k⁰`. Opposite gradients cancel as far as their weights are equal;
    duplicates count twice. An inactive task keeps its sums and its weight, while those
    active redistribute what they have together; in `d` that is scaled to sum to their
    number. Cost: a copy of the task gradients in memory, float32 or wider, and two
    passes over it; one number a task is reduced.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        learning_rate: Step size of the weights' logarithms.

    Returns:
        An aggregator; see `from_rows`. Its state's memory is an `ExcessMTLMemory`.

    Raises:
        ValueError: If `num_tasks < 1` or `learning_rate < 0`.

    References:
        He et al., Robust Multi-Task Learning with Excess Risks, ICML 2024,
        https://arxiv.org/abs/2402.02009.
    """
    if learning_rate < 0:
        raise ValueError(f"learning_rate is {learning_rate}; pass 0 or more.")

    def memory(params: optax.Params) -> ExcessMTLMemory:
        # Two arrays: a buffer that is there twice cannot be donated.
        dtype = accumulation_dtype(params)
        zeros = jnp.zeros(num_tasks, dtype), jnp.zeros(num_tasks, dtype)
        return ExcessMTLMemory(zero_rows(params, num_tasks), *zeros)

    def combine(
        task_gradients: PyTree,
        active: Bool[Array, " tasks"],
        memory: ExcessMTLMemory,
    ) -> tuple[PyTree, ExcessMTLMemory]:
        squares = update_rows(
            lambda square, gradient: square + gradient**2,
            memory.squares,
            task_gradients,
            active,
        )
        risks = jnp.where(active, excess_risks(task_gradients, squares), 0)
        baseline = memory.baseline.astype(risks.dtype)
        baseline = jnp.where(baseline > 0, baseline, risks)
        ratios = risks / jnp.where(baseline > 0, baseline, 1)
        values, log_weights = weights(
            memory.log_weights.astype(risks.dtype),
            ratios,
            active,
            learning_rate=learning_rate,
        )
        gradient = weighted_sum(task_gradients, values)
        return gradient, ExcessMTLMemory(squares, baseline, log_weights)

    return from_rows(combine, num_tasks, memory=memory)
