"""DualProj: project the mean gradient onto the cone that conflicts with no task."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, all_active, from_weights, unit_rows
from mtl_jax.optim.nonnegative import nonnegative_minimizer, precise_matmul
from mtl_jax.optim.preference import (
    Preference,
    check_preference,
    task_preference,
)


def weights(
    gramian: Float[Array, "tasks tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    preference: Preference | None = None,
    regularization: float = 0.0,
) -> Float[Array, " tasks"]:
    """Weights `argmin vᵀ G v` over `v ≥ p`.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.
        preference: What each task counts in the vector to project, `p`; `1/K` by
            default.
        regularization: Ridge added to `G`, relative to its trace.

    Returns:
        Weights of the Gramian's dtype, `p` and above, 0 for inactive tasks.
    """
    num_tasks = gramian.shape[0]
    active = all_active(num_tasks) if active is None else active
    diagonal = jnp.where(active, jnp.diagonal(gramian), 0)
    ridge = regularization * jnp.sum(diagonal) * active.astype(gramian.dtype)
    identity = jnp.eye(num_tasks, dtype=gramian.dtype)
    cosines, norms, _ = unit_rows(gramian + ridge[:, None] * identity, active)

    # With v = p + x / norms the problem is min ½ xᵀCx + (C (norms p))ᵀx over x ≥ 0.
    largest = jnp.max(norms)
    norms = norms / jnp.where(largest > 0, largest, 1)
    shares = task_preference(preference, active, norms.dtype)
    minimize = nonnegative_minimizer(cosines)
    mixed = precise_matmul(cosines, norms * shares)
    lift = minimize(-mixed, mixed < 0)
    lift = jnp.where(norms > 0, lift / jnp.where(norms > 0, norms, 1), 0)
    return jnp.where(active, shares + lift, 0)


def dualproj(
    num_tasks: int,
    *,
    preference: Sequence[float] | None = None,
    regularization: float = 0.0,
) -> Aggregator:
    """Project the mean of the task gradients onto their dual cone.

    `d` is the vector nearest to `(1/K) sum_k g_k` with `d · g_k ≥ 0` for every task:
    the mean itself where it conflicts with nobody. The projection of gradient episodic
    memory, with the mean in the place of the newest task.

    A zero gradient counts in the mean alone; opposite gradients leave what is
    orthogonal to them; duplicates count twice in the mean. Where a positive combination
    of all gradients is zero, so is `d`. Cost: the Gramian and one small quadratic
    program.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        preference: What each task counts in the vector to project, one number a task,
            in place of `1/K`. Inactive tasks leave their part to the others.
        regularization: Ridge added to the Gramian, relative to its trace. It is not
            needed for stability, and leaves some conflict where it is positive.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1` or `regularization < 0`, or `preference` is not
            `num_tasks` nonnegative numbers, some positive.

    References:
        Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning,
        NeurIPS 2017, https://arxiv.org/abs/1706.08840.
        Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024,
        https://arxiv.org/abs/2406.16232.
    """
    if regularization < 0:
        raise ValueError(f"regularization is {regularization}; pass 0 or more.")
    check_preference(preference, num_tasks)

    def weigh(gramian: Array, active: Array) -> Array:
        return weights(
            gramian, active, preference=preference, regularization=regularization
        )

    return from_weights(weigh, num_tasks)
