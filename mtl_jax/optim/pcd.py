"""PCD: follow one task, and let every other gain a little as well."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows
from mtl_jax.optim.nonnegative import nonnegative_minimizer


class PCDMemory(NamedTuple):
    """What PCD carries from step to step.

    Attributes:
        mean_squares: Moving average of each task's squared gradient norm.
        totals: The sum of the weights in that average, below 1; 0 for a task that has
            not been active yet.
    """

    mean_squares: Float[Array, " tasks"]
    totals: Float[Array, " tasks"]


def weights(
    gramian: Float[Array, "tasks tasks"],
    memory: PCDMemory,
    active: Bool[Array, " tasks"] | None = None,
    *,
    primary: int | Int[Array, ""] = 0,
    tau: float = 0.02,
    beta: float = 0.999,
) -> tuple[Float[Array, " tasks"], PCDMemory]:
    """Weights of the direction nearest to one gradient that helps all other tasks.

    Args:
        gramian: Inner products of the task gradients.
        memory: Moving averages of earlier steps, all zeros at first.
        active: Which tasks are present; all by default.
        primary: Index of the task to follow.
        tau: What share of the progress along its own gradient each other task is due.
        beta: Decay of the moving averages.

    Returns:
        `(weights, memory)`: weights of the Gramian's dtype, nonnegative, 0 for inactive
        tasks; and the averages of the next step, unchanged for inactive tasks.
    """
    cosines, norms, active = unit_rows(gramian, active)
    memory = _average(memory, norms, active, beta)
    present = norms > 0
    usual = jnp.sqrt(jnp.where(present, memory.mean_squares, 1))
    lengths = norms / usual

    # With d = lengths[primary] u_primary + sum_j y_j u_j, y ≥ 0, the other tasks need
    # C y ≥ needs, with equality where y_j > 0.
    own = lengths[primary]
    others = present & (jnp.arange(len(norms)) != primary)
    needs = jnp.where(others, tau * lengths - own * cosines[:, primary], 0)
    addition = _least_addition(cosines, needs, others)
    values = addition.at[primary].set(own)

    # |d|² as d · (lengths[primary] u_primary + sum_j y_j u_j), where the inner products
    # of the second part are known exactly: they are what the others need.
    along_own = own + jnp.sum(addition * cosines[:, primary])
    square = own * along_own + tau * jnp.sum(addition * lengths)
    epsilon = jnp.finfo(norms.dtype).eps
    noise = len(norms) * epsilon * own * (own + jnp.sum(addition))
    vanishes = square <= noise
    length = jnp.sqrt(jnp.where(vanishes, 1, square))
    scale = jnp.where(vanishes, 0, norms[primary] / length)
    return scale * values / jnp.where(present, norms, 1), memory


def pcd(
    num_tasks: int, *, primary: int = 0, tau: float = 0.02, beta: float = 0.999
) -> Aggregator:
    """Follow the gradient of one task as closely as the others can bear.

    Priority-Constrained Descent. Every gradient is divided by the root of a moving
    average of its squared norm, `ĝ_k = g_k / sqrt(v_k)`, corrected for its start at
    zero. Then `d̂ = argmin ½ |d − ĝ_1|²` over `ĝ_j · d ≥ tau |ĝ_j|²` for all others
    `j`, where `g_1` stands for the primary task, and `d = |g_1| d̂ / |d̂|`. Exact: the
    dual is a quadratic program over nonnegative multipliers.

    `d` has the length of `g_1`, which it equals where no other task is left with less
    than its due. Scaling all gradients alike scales `d`, and scaling that of another
    task in every step changes nothing. A zero gradient of another task asks for
    nothing; duplicates ask once. Opposite to `g_1`, another task wins: `d = −g_1`, as
    it must gain at any price. Where no direction helps all others (two of them
    opposite, or more tasks than parameters), as far as the precision of the Gramian can
    tell, they are given up and `d = g_1`. `d = 0` where `g_1` is zero or inactive, and
    where `tau = 0` and nothing but zero is free of conflict. An inactive task keeps its
    average. Cost: the Gramian, then at most about `tasks` small linear systems; the
    state keeps two numbers a task.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        primary: Index of the task to follow.
        tau: What share of the progress along its own gradient each other task is due,
            in [0, 1].
        beta: Decay of the moving averages, in [0, 1).

    Returns:
        An aggregator; see `from_weights`. Its state's memory is a `PCDMemory`.

    Raises:
        ValueError: If `num_tasks < 1`, `primary` is no index of a task, `tau` is not in
            [0, 1] or `beta` is not in [0, 1).

    References:
        Varam and AlHajri, Not All Objectives Are Born Equal: Priority-Constrained
        Descent for Hierarchical Multi-Objective Optimization, TMLR 2026,
        https://arxiv.org/abs/2606.29521.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau is {tau}; pass a number from 0 to 1.")
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; pass 0 or more and less than 1.")
    if num_tasks >= 1 and not 0 <= primary < num_tasks:
        raise ValueError(
            f"primary is {primary}; pass the index of one of the {num_tasks} tasks."
        )

    def initial_memory(dtype: jnp.dtype) -> PCDMemory:
        # Two arrays: a buffer that is there twice cannot be donated.
        return PCDMemory(jnp.zeros(num_tasks, dtype), jnp.zeros(num_tasks, dtype))

    def weigh(
        gramian: Array, active: Array, memory: PCDMemory
    ) -> tuple[Array, PCDMemory]:
        return weights(gramian, memory, active, primary=primary, tau=tau, beta=beta)

    return from_weights(weigh, num_tasks, memory=initial_memory)


def _average(memory: PCDMemory, norms: Array, active: Array, beta: float) -> PCDMemory:
    totals = beta * memory.totals + (1 - beta)
    # In this form a task's first average is its squared norm to the last digit.
    moved = memory.mean_squares + (1 - beta) / totals * (norms**2 - memory.mean_squares)
    return PCDMemory(
        mean_squares=jnp.where(active, moved, memory.mean_squares),
        totals=jnp.where(active, totals, memory.totals),
    )


def _least_addition(cosines: Array, needs: Array, others: Array) -> Array:
    """Find `y ≥ 0` with `C y ≥ needs` and `yᵀ(C y − needs) = 0`, 0 if there is none.

    The vector `sum_j y_j u_j` is the shortest with these inner products: a
    least-distance problem. Its dual, `min |sum_j v_j u_j|² + (1 − needsᵀv)²` over
    `v ≥ 0`, has a minimum in any case, which is zero where the needs contradict each
    other; else `y = v / (1 − needsᵀv)` (Lawson and Hanson, chapter 23).
    """
    largest = jnp.max(jnp.abs(needs))
    largest = jnp.where(largest > 0, largest, 1)
    needs = needs / largest
    both = others[:, None] & others[None, :]
    identity = jnp.eye(len(needs), dtype=cosines.dtype)
    cosines = jnp.where(both, cosines, identity)
    minimize = nonnegative_minimizer(cosines + needs[:, None] * needs[None, :])
    v = minimize(needs, needs > 0)
    remainder = 1 - jnp.sum(needs * v)
    epsilon = jnp.finfo(needs.dtype).eps
    # Where the needs contradict each other, `C v` is zero but for rounding, which shows
    # in the remainder `sum_j v_j` times enlarged.
    noise = len(needs) * epsilon * (1 + jnp.sum(v)) ** 2
    met = remainder > noise
    return jnp.where(met, largest * v / jnp.where(met, remainder, 1), 0)
