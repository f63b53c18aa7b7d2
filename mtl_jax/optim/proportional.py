"""The fair weights that Nash-MTL and FairGrad share, by a bounded Newton iteration."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.optim.aggregator import unit_rows
from mtl_jax.optim.nonnegative import precise_matmul
from mtl_jax.optim.spectrum import pseudo_inverse

# Five to ten are usual; extreme exponents and stationary points need more.
_MAX_STEPS = 120


def fair_weights(
    gramian: Float[Array, "tasks tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    alpha: float,
) -> Float[Array, " tasks"]:
    """Positive weights with `(G w)_k = w_k^(−1/α)`.

    Those of the one minimum of `½ wᵀ G w − sum_k φ(w_k)`, `φ'(x) = x^(−1/α)`, which is
    strictly convex. With `v = w * norms` and `s = C v`, `C` the cosines, the equations
    are `s_k^α v_k = norms_k^(1−α)`: linear in the logarithms of `s` and `v`, which are
    both kept, so that no power overflows and both stay positive.

    A task is held where it belongs to a set of tasks whose gradients cancel in some
    positive combination: no direction improves all of that set. Then the minimum lies
    at infinity, and its limit is returned: the direction is orthogonal to the held
    tasks, and fair to the parts of the others that are. Should even rounding keep the
    iteration from an end, as it can where `alpha` is beyond 10 and zero is in the
    convex hull, all weights are 0.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.
        alpha: Exponent of fairness, positive.

    Returns:
        Weights of the Gramian's dtype, 0 for inactive tasks and zero gradients,
        positive for all others unless some task is held.
    """
    cosines, norms, _ = unit_rows(gramian, active)
    present = norms > 0
    largest = jnp.max(norms)
    largest = jnp.where(largest > 0, largest, 1)
    log_norms = jnp.where(present, jnp.log(jnp.where(present, norms, 1) / largest), 0)
    start = _start(cosines, log_norms, ~present, alpha)

    def unfinished(state: _State) -> Array:
        return ~state.done & (state.steps < _MAX_STEPS)

    def step(state: _State) -> _State:
        return _step(state, cosines, log_norms, alpha)

    found = jax.lax.while_loop(unfinished, step, start)
    values = jnp.where(found.held, 0, jnp.exp(found.log_values) / found.lengths)
    values = jnp.where(found.done, values, 0)
    values -= precise_matmul(found.shadows, values)
    values = values * largest ** ((1 - alpha) / (1 + alpha))
    return jnp.where(present, values / jnp.where(present, norms, 1), 0)


class _State(NamedTuple):
    log_values: Float[Array, " tasks"]  # of v
    log_projections: Float[Array, " tasks"]  # of s
    held: Bool[Array, " tasks"]
    matrix: Float[Array, "tasks tasks"]  # cosines of what is orthogonal to held tasks
    lengths: Float[Array, " tasks"]  # of that part of each unit gradient
    shadows: Float[Array, "tasks tasks"]  # the other part, in held tasks
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def _start(matrix: Array, log_norms: Array, held: Array, alpha: float) -> _State:
    """The solution for orthogonal gradients."""
    logs = (1 - alpha) / (1 + alpha) * jnp.where(held, 0, log_norms)
    return _State(
        log_values=logs,
        log_projections=logs,
        held=held,
        matrix=matrix,
        lengths=jnp.ones_like(log_norms),
        shadows=jnp.zeros_like(matrix),
        steps=jnp.asarray(0),
        done=jnp.all(held),
    )


def _step(state: _State, cosines: Array, log_norms: Array, alpha: float) -> _State:
    """One Newton step on `C v = s` and `α log s + log v = (1 − α) log norms`."""
    matrix, held = state.matrix, state.held
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    dtype = jnp.finfo(matrix.dtype)
    shift = jnp.max(jnp.where(held, -jnp.inf, state.log_values))
    values = jnp.exp(jnp.where(held, 0, state.log_values - shift))
    projections = jnp.exp(jnp.where(held, 0, state.log_projections - shift))
    projections = jnp.maximum(projections, dtype.tiny)
    norms_term = jnp.where(held, 0, log_norms + jnp.log(state.lengths))
    balance = (
        (1 - alpha) * norms_term - alpha * state.log_projections - state.log_values
    )
    residual = projections - precise_matmul(matrix, values)

    # (C + diag(s / αv)) Δv = residual + s balance / α, scaled to a unit diagonal. The
    # bound matters where projections are lost in rounding: it keeps the noise small.
    threshold = 4 * matrix.shape[0] * dtype.eps
    right = residual + projections * balance / alpha
    ratio = jnp.minimum(alpha * values / projections, 1 / threshold)
    scale = jnp.sqrt(ratio / (1 + ratio))
    scaled = scale[:, None] * matrix * scale[None, :]
    scaled += identity / (1 + ratio)[:, None]
    change = scale * jnp.linalg.solve(scaled, scale * right)
    # Δv / v, by whichever of two equal forms divides by the larger number.
    direct = change / jnp.maximum(values, dtype.tiny)
    indirect = alpha * (right - precise_matmul(matrix, change)) / projections
    relative = jnp.where(ratio > 1, direct, indirect)

    error = jnp.max(jnp.abs(residual))
    done = jnp.maximum(error, jnp.max(jnp.abs(change))) <= dtype.eps**0.75
    if alpha < 1:
        # Projections may decay below rounding, and their values grow without end.
        effect = jnp.max(jnp.abs(precise_matmul(matrix, change)))
        done |= jnp.maximum(error, effect) <= threshold / 4
    following = state._replace(
        log_values=state.log_values + _damped_log(relative),
        log_projections=state.log_projections
        + _damped_log((balance - relative) / alpha),
        steps=state.steps + 1,
        done=done,
    )

    # A convex combination of unit gradients that is as short as rounding can tell:
    # at the root of this length, tasks in it stand out from those that are not.
    shares = jnp.where(held, 0, values / jnp.sum(jnp.where(held, 0, values)))
    squared_length = jnp.sum(shares * precise_matmul(matrix, shares))
    cancelling = shares >= threshold**0.25 * jnp.max(shares)

    def hold() -> _State:
        return _hold(
            cosines, log_norms, held | cancelling, alpha, threshold, following.steps
        )

    return jax.lax.cond(squared_length <= threshold, hold, lambda: following)


def _hold(
    cosines: Array,
    log_norms: Array,
    held: Array,
    alpha: float,
    threshold: float | np.floating,
    steps: Array,
) -> _State:
    """Start again with the parts of the gradients orthogonal to the held ones."""
    both = held[:, None] & held[None, :]
    identity = jnp.eye(cosines.shape[0], dtype=cosines.dtype)
    inverse = jnp.where(both, pseudo_inverse(jnp.where(both, cosines, identity)), 0)
    shadows = jnp.matmul(inverse, cosines, precision=jax.lax.Precision.HIGHEST)
    product = jnp.matmul(cosines, shadows, precision=jax.lax.Precision.HIGHEST)
    matrix = cosines - (product + product.T) / 2
    squares = jnp.diagonal(matrix)
    # What lies in the span of the held tasks is orthogonal to the direction already.
    held = held | (squares <= threshold)
    lengths = jnp.where(held, 1, jnp.sqrt(jnp.where(held, 1, squares)))
    matrix = matrix / lengths[:, None] / lengths[None, :]
    both = held[:, None] | held[None, :]
    matrix = jnp.where(both, identity, matrix)
    start = _start(matrix, log_norms + jnp.log(lengths), held, alpha)
    return start._replace(lengths=lengths, shadows=shadows, steps=steps)


def _damped_log(relative: Array) -> Array:
    """Log of the factor by which to change a positive number: `1 + relative`.

    Below one half the factor falls as `1 / relative`, smoothly, and stays positive.
    """
    bend = -0.5
    steep = -jnp.log(-4 * jnp.minimum(relative, bend))
    return jnp.where(relative < bend, steep, jnp.log1p(jnp.maximum(relative, bend)))
