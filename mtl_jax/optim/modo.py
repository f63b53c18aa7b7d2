"""MoDo: learn the min-norm weights by small steps on independent batches."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, all_active
from mtl_jax.optim.nonnegative import precise_matmul
from mtl_jax.optim.simplex import from_cross_gramian, project_simplex, restrict


def weights(
    cross_gramian: Float[Array, "tasks tasks"],
    previous: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    learning_rate: float = 0.1,
    regularization: float = 0.1,
) -> tuple[Float[Array, " tasks"], Float[Array, " tasks"]]:
    """One projected step towards the min-norm weights.

    Args:
        cross_gramian: Inner products of the task gradients of two independent batches.
        previous: The point on the simplex to go on from, equal parts at first.
        active: Which tasks are present; all by default.
        learning_rate: Size of the step.
        regularization: Strength of the pull towards equal weights.

    Returns:
        `(weights, point)` of the matrix's dtype: weights that sum to 1 over the active
        tasks, 0 for the others; and the point to go on from, in which the active tasks
        hold as much together as before and the others what they had.
    """
    active = all_active(len(previous)) if active is None else active
    start, share = restrict(previous, active)
    slope = precise_matmul(cross_gramian, start) + regularization * start
    values = project_simplex(start - learning_rate * slope, active)
    return values, jnp.where(active, share * values, previous)


def modo(
    num_tasks: int, *, learning_rate: float = 0.1, regularization: float = 0.1
) -> Aggregator:
    """Step along a convex combination whose weights drift to those of MGDA.

    Multi-objective gradient with double sampling. With `A = J₂ J₃ᵀ` from the gradients
    of two further batches, the weights, equal at first, take one step a batch,

        λ ← project(λ − learning_rate (A λ + regularization λ))

    onto the simplex, and `d = sum_k λ_k g_k`. The mean of `A λ` over batches is the
    slope of `½ |sum_k λ_k E[g_k]|²`, which the Gramian of a single batch overrates by
    its noise; so the weights approach the min-norm weights of the mean gradients.

    As published, the step grows with the square of the gradients' scale: multiplying
    all gradients by `s` is as good as multiplying the learning rate by `s²` and
    dividing the regularization by it. Where gradients are long, the weights jump from
    task to task, and where they are short, they hardly move. `d` is no longer than the
    longest gradient.

    Zero gradients everywhere draw the weights to equal parts; a single one gains
    weight, as does the shorter of two opposite gradients; duplicates keep equal
    weights. An inactive task keeps its part of the weights, while those active divide
    up what they have together; in `d` that is scaled to sum to 1. Cost: the gradients
    of three batches, and `tasks²` numbers reduced; the state keeps one a task. With
    batches A and B only, give their mean as `task_gradients`, and A and B as `second`
    and `third`: so do the authors.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        learning_rate: Step size of the weights.
        regularization: Strength of the pull towards equal weights.

    Returns:
        An aggregator whose `update` needs `second` and `third`; see
        `from_cross_gramian`.

    Raises:
        ValueError: If `num_tasks < 1`, `learning_rate < 0` or `regularization < 0`, or,
            from `update`, if a batch is missing.

    References:
        Chen et al., Three-Way Trade-Off in Multi-Objective Learning: Optimization,
        Generalization and Conflict-Avoidance, NeurIPS 2023,
        https://arxiv.org/abs/2305.20057.
    """
    for name, value in (
        ("learning_rate", learning_rate),
        ("regularization", regularization),
    ):
        if value < 0:
            raise ValueError(f"{name} is {value}; pass 0 or more.")

    def weigh(
        cross_gramian: Array, previous: Array, active: Array
    ) -> tuple[Array, Array]:
        return weights(
            cross_gramian,
            previous,
            active,
            learning_rate=learning_rate,
            regularization=regularization,
        )

    return from_cross_gramian(weigh, num_tasks)
