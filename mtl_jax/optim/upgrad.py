"""UPGrad: project each task's gradient onto the cone that conflicts with no task."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows
from mtl_jax.optim.nonnegative import nonnegative_minimizer
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
    """Average of the weights that make each task's gradient free of conflict.

    For task `i` these are `argmin vᵀ G v` over `v ≥ e_i`.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.
        preference: What each task's projected gradient counts; `1/K` by default.
        regularization: Ridge added to `G`, relative to its trace.

    Returns:
        Weights of the Gramian's dtype, nonnegative, 0 for inactive tasks.
    """
    num_tasks = gramian.shape[0]
    active = jnp.ones(num_tasks, bool) if active is None else active
    diagonal = jnp.where(active, jnp.diagonal(gramian), 0)
    ridge = regularization * jnp.sum(diagonal) * active.astype(gramian.dtype)
    identity = jnp.eye(num_tasks, dtype=gramian.dtype)
    cosines, norms, _ = unit_rows(gramian + ridge[:, None] * identity, active)

    # With v = e_i + x / norms * norms[i], row i's problem is
    # min ½ xᵀCx + C_iᵀx over x ≥ 0, whatever the norms.
    minimize = nonnegative_minimizer(cosines)
    lifts = jax.vmap(minimize)(-cosines, cosines < 0)
    ratio = norms[:, None] / jnp.where(norms > 0, norms, 1)[None, :]
    shares = task_preference(preference, active, norms.dtype)
    lifted = jnp.sum(shares[:, None] * lifts * ratio, axis=0)
    return jnp.where(active, shares + lifted, 0)


def upgrad(
    num_tasks: int,
    *,
    preference: Sequence[float] | None = None,
    regularization: float = 0.0,
) -> Aggregator:
    """Average the task gradients after projecting each onto the dual cone of them all.

    `d = (1/K) sum_i project(g_i)`, where `project` finds the nearest vector whose inner
    product with every task gradient is nonnegative. Hence `d · g_k ≥ 0` for every task,
    `d` is the mean where nothing conflicts, and scaling one gradient scales its share.

    A zero gradient adds nothing; opposite gradients cancel; duplicates count twice.
    Where a positive combination of all gradients is zero, so is `d`. Cost: the Gramian,
    then one small quadratic program a task.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        preference: What each task's projected gradient counts, one number a task, in
            place of `1/K`. Inactive tasks leave their part to the others.
        regularization: Ridge added to the Gramian, relative to its trace. It is not
            needed for stability, and leaves some conflict where it is positive.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1` or `regularization < 0`, or `preference` is not
            `num_tasks` nonnegative numbers, some positive.

    References:
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
