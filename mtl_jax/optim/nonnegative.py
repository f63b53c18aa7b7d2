"""Quadratic minimisation over nonnegative vectors, the core of the exact methods."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

Minimizer = Callable[
    [Float[Array, " size"], Bool[Array, " size"]], Float[Array, " size"]
]


def nonnegative_minimizer(matrix: Float[Array, "size size"]) -> Minimizer:
    """Prepare to minimise `½ xᵀ A x − bᵀ x` over `x ≥ 0` for any number of `b`.

    The active-set method of Lawson and Hanson adds and drops coordinates, at most
    `4 * size` times; from a good guess a few steps are enough. It solves linear systems
    to the end, so that the optimality conditions hold to rounding.

    Args:
        matrix: Symmetric positive semidefinite `A` with a diagonal of order one.

    Returns:
        A function `(b, guess) -> x`, where `b` lies in the range of `A` (the minimum
        exists) and `guess` marks coordinates expected to be positive: it saves time
        and never changes the result but by rounding. Where nothing better is known,
        guess `b > 0`, the coordinates that would grow from zero.

    References:
        Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    size = matrix.shape[0]
    indices = jnp.arange(size)
    epsilon = jnp.finfo(matrix.dtype).eps

    def minimize(b: Array, guess: Array) -> Array:
        def step(state: _ActiveSet) -> _ActiveSet:
            support = state.support
            target = solver_on(matrix, support)(b)

            # Walk towards the minimum on the support, to the first wall at most.
            blocked = support & (target <= 0)
            fraction = state.x / jnp.where(blocked, state.x - target, 1)
            fraction = jnp.where(blocked, fraction, 1)
            shortest = jnp.min(fraction)
            dropped = blocked & (fraction <= shortest)
            x = jnp.maximum(state.x + shortest * (target - state.x), 0)
            x = jnp.where(support & ~dropped, x, 0)

            # A coordinate that enters and wants to leave at once is rounding noise.
            banned = state.banned | (dropped & (indices == state.entering))
            gradient = b - precise_matmul(matrix, x)
            noise = size * epsilon * (jnp.max(jnp.abs(b)) + jnp.max(x))
            candidates = ~support & ~banned & (gradient > noise)
            best = jnp.argmax(jnp.where(candidates, gradient, -jnp.inf))

            inside = ~jnp.any(blocked)
            enters = inside & jnp.any(candidates)
            return _ActiveSet(
                x=x,
                support=(support & ~dropped) | (enters & (indices == best)),
                entering=jnp.where(enters, best, -1),
                banned=banned,
                steps=state.steps + 1,
                done=inside & ~enters,
            )

        def unfinished(state: _ActiveSet) -> Array:
            return ~state.done & (state.steps < 4 * size)

        start = _ActiveSet(
            x=jnp.zeros_like(b),
            support=guess,
            entering=jnp.asarray(-1),
            banned=jnp.zeros_like(guess),
            steps=jnp.asarray(0),
            done=jnp.asarray(False),
        )
        return jax.lax.while_loop(unfinished, step, start).x

    return minimize


def solver_on(
    matrix: Float[Array, "size size"], support: Bool[Array, " size"]
) -> Callable[[Float[Array, " size"]], Float[Array, " size"]]:
    """Prepare to solve `A x = b` for vectors that are zero off a support.

    Args:
        matrix: Symmetric positive semidefinite `A` with a diagonal of order one.
        support: Which rows and columns of `A` to keep.

    Returns:
        A function `b -> x` that ignores the entries of `b` off the support.
    """
    factor = cho_factor(_restrict(matrix, support))

    def solve(b: Array) -> Array:
        x = cho_solve(factor, jnp.where(support, b, 0))
        # The second step undoes the ridge of `_restrict`.
        left = jnp.where(support, b - precise_matmul(matrix, x), 0)
        return x + cho_solve(factor, left)

    return solve


def precise_matmul(
    matrix: Float[Array, "size size"], vector: Float[Array, " size"]
) -> Float[Array, " size"]:
    """Multiply in the full precision of the inputs on every platform."""
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


class _ActiveSet(NamedTuple):
    x: Float[Array, " size"]
    support: Bool[Array, " size"]
    entering: Int[Array, ""]
    banned: Bool[Array, " size"]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def _restrict(matrix: Array, support: Array) -> Array:
    """The matrix on its support, the identity elsewhere, made safe to invert."""
    size = matrix.shape[0]
    both = support[:, None] & support[None, :]
    identity = jnp.eye(size, dtype=matrix.dtype)
    # Duplicate or dependent rows are singular up to rounding, of either sign.
    ridge = 2 * size * jnp.finfo(matrix.dtype).eps
    return jnp.where(both, matrix, identity) + ridge * identity
