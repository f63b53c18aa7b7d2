"""CAGrad: help the worst-off task, without straying far from the mean gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows
from mtl_jax.optim.nonnegative import (
    nonnegative_minimizer,
    precise_matmul,
    solver_on,
)

# Each step solves one piece of a piecewise quadratic exactly; a handful is usual.
_MAX_STEPS = 40


def weights(
    gramian: Float[Array, "tasks tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    c: float = 0.4,
    rescale: bool = False,
) -> Float[Array, " tasks"]:
    """Weights of the best worst case within a ball around the mean gradient.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.
        c: Radius of the ball, relative to the length of the mean gradient.
        rescale: Whether to divide by `1 + c²`.

    Returns:
        Weights of the Gramian's dtype, `1/K` and above before rescaling, 0 for inactive
        tasks.
    """
    cosines, norms, active = unit_rows(gramian, active)
    count = jnp.maximum(jnp.sum(active), 1).astype(norms.dtype)
    mean = active.astype(norms.dtype) / count

    # In coordinates of unit rows, relative to the largest norm.
    largest = jnp.max(norms)
    norms = norms / jnp.where(largest > 0, largest, 1)
    product = precise_matmul(cosines, mean * norms)
    length = jnp.sqrt(jnp.maximum(jnp.sum(mean * norms * product), 0))
    alignment = jnp.clip(product / jnp.where(length > 0, length, 1), -1, 1)

    correction = _correction(cosines, norms, alignment, active, c)
    values = mean + length * correction / jnp.where(norms > 0, norms, 1)
    return values / (1 + c**2) if rescale else values


def cagrad(num_tasks: int, *, c: float = 0.4, rescale: bool = False) -> Aggregator:
    """Maximise the least improvement of any task near the mean gradient.

    With `g₀` the mean of the task gradients, `d = argmax min_k d · g_k` over
    `|d − g₀| ≤ c |g₀|`. Equivalently `d = g₀ + c |g₀| g_w / |g_w|` with
    `g_w = sum_k w_k g_k` and `w` on the simplex minimising
    `g_w · g₀ + c |g₀| |g_w|`. `c = 0` gives the mean; as `c` grows the direction turns
    to that of MGDA. Exact: the multiplier of the ball is found by a safeguarded Newton
    iteration over its pieces, in each of which the solution is in closed form.

    Where `g_w = 0` (opposite gradients, more tasks than parameters) or a gradient is
    zero, no direction improves every task; then `d` is the vector nearest to `g₀` with
    the best worst case inside the ball, not zero. Duplicates weigh in `g₀` only.
    Cost: the Gramian, then a few quadratic programs of the size of `tasks`.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        c: Radius of the ball, relative to the length of the mean gradient.
        rescale: Whether to divide the result by `1 + c²`, as the authors' code does.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1` or `c < 0`.

    References:
        Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning,
        NeurIPS 2021, https://arxiv.org/abs/2110.14048.
    """
    if c < 0:
        raise ValueError(f"c is {c}; pass a radius of 0 or more.")

    def weigh(gramian: Array, active: Array) -> Array:
        return weights(gramian, active, c=c, rescale=rescale)

    return from_weights(weigh, num_tasks)


class _Search(NamedTuple):
    multiplier: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    y: Float[Array, " tasks"]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def _correction(
    cosines: Array, norms: Array, alignment: Array, active: Array, c: float
) -> Float[Array, " tasks"]:
    """Find `y ≥ 0` such that `x = sum_k y_k u_k` of length `c` has the best worst case.

    With unit gradients `u` and `|g₀| = 1`, the optimum of `max_x min_k norms_k u_k ·
    (g₀ + x)`, `|x| ≤ c`, has some level `λ` with `C y + alignment ≥ λ a`, `y ≥ 0`, and
    equality where `y > 0` (`a = 1/norms`). For fixed `λ` that is a quadratic program,
    and `|x|` grows with `λ`, so the level is found by a search in one dimension.
    """
    present = active & (norms > 0)
    has_zero_row = jnp.any(active & (norms == 0))
    smallest = jnp.min(jnp.where(present, norms, jnp.inf))
    a = jnp.where(present, smallest / jnp.where(present, norms, 1), 0)
    alignment = jnp.where(present, alignment, 0)

    # No point has a positive level if zero is in the hull. Searching over
    # μ = λ + aᵀy in place of λ lets λ rest at zero there while μ goes on. A zero
    # gradient forbids positive levels outright.
    anchor = jnp.where(has_zero_row, 0, 1).astype(a.dtype)
    matrix = cosines + anchor * a[:, None] * a[None, :]
    minimize = nonnegative_minimizer(matrix)
    epsilon = jnp.finfo(a.dtype).eps

    def level_bound(reach: float) -> Array:
        slack = (alignment + reach) / jnp.where(present, a, 1)
        return jnp.min(jnp.where(present, slack, jnp.inf))

    def step(state: _Search) -> _Search:
        multiplier = state.multiplier
        y = minimize(multiplier * a - alignment, state.y > 0)
        squared_length = jnp.sum(y * precise_matmul(cosines, y))
        short = squared_length < c**2
        low = jnp.where(short, multiplier, state.low)
        high = jnp.where(short, state.high, multiplier)

        # On this support y = multiplier * slope − offset.
        support = y > 0
        solve = solver_on(matrix, support)
        slope, offset = solve(a), solve(alignment)
        root = _larger_root(
            jnp.sum(slope * precise_matmul(cosines, slope)),
            jnp.sum(slope * precise_matmul(cosines, offset)),
            jnp.sum(offset * precise_matmul(cosines, offset)) - c**2,
        )
        stretch = multiplier + jnp.abs(multiplier) + 1
        middle = jnp.where(jnp.isfinite(high), (low + high) / 2, stretch)
        middle = jnp.minimum(middle, high)
        inside = (root > low) & (root < high)
        following = jnp.where(inside, root, middle)

        settled = jnp.abs(following - multiplier) <= 4 * epsilon * jnp.abs(following)
        # Zero lies in the hull as far as this precision can tell.
        resting = 1 - jnp.sum(a * slope) < cosines.shape[0] * epsilon
        return _Search(
            multiplier=following,
            low=low,
            high=high,
            y=y,
            steps=state.steps + 1,
            done=settled | (short & resting),
        )

    def unfinished(state: _Search) -> Array:
        return ~state.done & (state.steps < _MAX_STEPS)

    ceiling = jnp.where(has_zero_row, 0, jnp.inf).astype(a.dtype)
    found = jax.lax.while_loop(
        unfinished,
        step,
        _Search(
            multiplier=jnp.minimum(level_bound(c), ceiling),
            low=level_bound(0),
            high=ceiling,
            y=jnp.zeros_like(a),
            steps=jnp.asarray(0),
            done=~jnp.any(present),
        ),
    )
    return found.y


def _larger_root(quadratic: Array, half_linear: Array, constant: Array) -> Array:
    """Larger root of `quadratic t² − 2 half_linear t + constant`, NaN without any."""
    root = jnp.sqrt(half_linear**2 - quadratic * constant)
    sum_form = (half_linear + root) / quadratic
    # The same number, written to avoid cancellation.
    quotient_form = constant / (half_linear - root)
    return jnp.where(half_linear > 0, sum_form, quotient_form)
