"""Aligned-MTL: make the task gradients orthogonal and of one length, then mix them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows
from mtl_jax.optim.nonnegative import precise_matmul
from mtl_jax.optim.preference import (
    Preference,
    check_preference,
    task_preference,
)
from mtl_jax.optim.spectrum import eigenvalues_and_vectors

Scale = Literal["min", "median", "rmse"]

# Two to five are usual.
_MAX_SWEEPS = 15
# Norms within this ratio need no care about small singular values.
_MILD_RATIO = 30.0


def weights(
    gramian: Float[Array, "tasks tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    scale: Scale = "min",
    preference: Preference | None = None,
) -> Float[Array, " tasks"]:
    """Weights `B p` with `B = σ (G^(1/2))⁺`.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.
        scale: What `σ` is of the nonzero singular values of the stacked gradients:
            the smallest, the lower median, or their root mean square.
        preference: What each aligned gradient counts, `p`; `1/K` by default.

    Returns:
        Weights of the Gramian's dtype, of any sign, 0 for inactive tasks and zero
        gradients.
    """
    cosines, norms, active = unit_rows(gramian, active)
    present = norms > 0
    largest = jnp.max(norms)
    norms = norms / jnp.where(largest > 0, largest, 1)
    wanted = task_preference(preference, active, norms.dtype)

    # Coordinates of the unit gradients, in columns. The rank is decided here, where
    # the ratio of their norms cannot hide a direction behind rounding.
    eigenvalues, vectors, kept = eigenvalues_and_vectors(cosines)
    roots = jnp.where(kept, jnp.sqrt(eigenvalues), 0)
    units = roots[:, None] * vectors.T
    rank = jnp.sum(kept) - jnp.sum(~present)

    lengths, columns, shares = _orthogonal(units * norms[None, :], wanted)
    order = jnp.argsort(-lengths)
    lengths, columns, shares = lengths[order], columns[:, order], shares[order]
    first = jnp.arange(lengths.shape[0]) < rank
    safe = jnp.where(first & (lengths > 0), lengths, 1)
    mixed = precise_matmul(columns / safe[None, :], jnp.where(first, shares, 0))
    mixed = mixed * _common_length(jnp.where(first, lengths, 0), rank, scale)

    # Which combination of the gradients has these coordinates?
    inverse = jnp.where(kept, 1 / jnp.sqrt(eigenvalues), 0)
    values = precise_matmul(vectors, inverse * mixed)
    return jnp.where(present, values / jnp.where(present, norms, 1), 0)


def aligned_mtl(
    num_tasks: int,
    *,
    scale: Scale = "min",
    preference: Sequence[float] | None = None,
) -> Aggregator:
    """Mix the nearest orthogonal system to the task gradients.

    With the singular value decomposition `J = U Σ Vᵀ` of the stacked gradients, the
    update is `d = σ (U Vᵀ)ᵀ p`: every principal direction gets the same length `σ`, so
    that none dominates, and the aligned gradients are averaged by the preference `p`.
    The authors take their sum, `preference=[1] * num_tasks`.

    A zero gradient has no direction of its own and only counts in the mean; duplicates
    share one direction; `[g, -g]` gives 0, but `[g, -3g]` gives `-g` at any scale, as
    the longer one decides the only direction there is. The rank is that of the unit
    gradients: what is shorter in them than the root of `tasks` times the precision,
    1e-3 in float32, is dropped. Exact for any norms: singular values that differ widely
    come from one-sided Jacobi rotations, which keep the small ones. Cost: the Gramian,
    two small eigenvalue problems, and a few sweeps of rotations where norms differ by
    more than 30.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        scale: What `σ` is of the nonzero singular values: the smallest ("min"), the
            lower median ("median") or the root mean square ("rmse").
        preference: What each aligned gradient counts, one number a task, in place of
            `1/K`. Inactive tasks leave their part to the others.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`, `scale` is none of the three, or `preference` is
            not `num_tasks` nonnegative numbers, some positive.

    References:
        Senushkin et al., Independent Component Alignment for Multi-Task Learning,
        CVPR 2023, https://arxiv.org/abs/2305.19000.
        Demmel and Veselić, Jacobi's method is more accurate than QR, SIAM Journal on
        Matrix Analysis and Applications 13, 1992.
    """
    if scale not in ("min", "median", "rmse"):
        raise ValueError(f'scale is {scale!r}; pass "min", "median" or "rmse".')
    check_preference(preference, num_tasks)

    def weigh(gramian: Array, active: Array) -> Array:
        return weights(gramian, active, scale=scale, preference=preference)

    return from_weights(weigh, num_tasks)


def _common_length(lengths: Array, rank: Array, scale: Scale) -> Float[Array, ""]:
    """What all lengths become, given `rank` positive ones, the longest first."""
    if scale == "rmse":
        count = jnp.maximum(rank, 1).astype(lengths.dtype)
        return jnp.sqrt(jnp.sum(lengths**2) / count)
    index = rank - 1 if scale == "min" else rank // 2
    return lengths[jnp.maximum(index, 0)]


class _Sweep(NamedTuple):
    columns: Float[Array, "rows even"]
    steps: Int[Array, ""]


def _orthogonal(
    matrix: Float[Array, "tasks tasks"], preference: Float[Array, " tasks"]
) -> tuple[Float[Array, " even"], Float[Array, "tasks even"], Float[Array, " even"]]:
    """Rotate columns until all are orthogonal, and the preference with them.

    Every rotation mixes two columns in proportion to their lengths, which leaves the
    digits of short columns alone; eigenvalues of the product would lose them.

    Returns:
        `(lengths, columns, preference)`, one column more than given if these are odd.
    """
    size = matrix.shape[0]
    stacked = jnp.concatenate([matrix, preference[None, :]])
    lengths = jnp.sqrt(jnp.sum(matrix**2, axis=0))
    shortest = jnp.min(jnp.where(lengths > 0, lengths, jnp.inf))
    # Where all are of one order, rotate by eigenvectors: nothing is left to do but for
    # rounding.
    product = _matmul(matrix.T, matrix)
    vectors = jnp.linalg.eigh(product)[1]
    mild = jnp.max(lengths) <= _MILD_RATIO * shortest
    identity = jnp.eye(size, dtype=matrix.dtype)
    stacked = _matmul(stacked, jnp.where(mild, vectors, identity))
    stacked = jnp.pad(stacked, ((0, 0), (0, size % 2)))

    half = stacked.shape[1] // 2
    tolerance = 4 * size * jnp.finfo(matrix.dtype).eps

    def unfinished(state: _Sweep) -> Array:
        columns = state.columns[:-1]
        lengths = jnp.sqrt(jnp.sum(columns**2, axis=0))
        # What rotations left of dependent columns is rounding.
        real = lengths > tolerance / 4 * jnp.max(lengths)
        safe = jnp.where(real, lengths, 1)
        units = jnp.where(real[None, :], columns / safe[None, :], 0)
        cosines = jnp.triu(_matmul(units.T, units), 1)
        return (jnp.max(jnp.abs(cosines)) > tolerance) & (state.steps < _MAX_SWEEPS)

    def rotate(_, columns: Array) -> Array:
        left, right = columns[:, :half], columns[:, half:]
        cosine, sine = _rotation(left[:-1], right[:-1])
        left, right = (
            cosine[None, :] * left - sine[None, :] * right,
            sine[None, :] * left + cosine[None, :] * right,
        )
        # Seats of a tournament: the first stays, all others move on by one around the
        # table, and all pairs have met when they are back.
        first, rest = left[:, :1], left[:, 1:]
        seats = (first, right[:, :1], rest[:, :-1], right[:, 1:], rest[:, -1:])
        return jnp.concatenate(seats, axis=1)

    def sweep(state: _Sweep) -> _Sweep:
        columns = jax.lax.fori_loop(0, 2 * half - 1, rotate, state.columns)
        return _Sweep(columns, state.steps + 1)

    found = jax.lax.while_loop(unfinished, sweep, _Sweep(stacked, jnp.asarray(0)))
    columns = found.columns[:-1]
    return jnp.sqrt(jnp.sum(columns**2, axis=0)), columns, found.columns[-1]


def _rotation(left: Array, right: Array) -> tuple[Array, Array]:
    """Cosine and sine of the smaller angles that make pairs of columns orthogonal."""
    overlap = jnp.sum(left * right, axis=0)
    gap = jnp.sum(right**2, axis=0) - jnp.sum(left**2, axis=0)
    safe = jnp.where(overlap == 0, 1, overlap)
    cotangent = gap / (2 * safe)
    sign = jnp.where(cotangent >= 0, 1, -1).astype(left.dtype)
    tangent = sign / (jnp.abs(cotangent) + jnp.hypot(cotangent, jnp.ones_like(gap)))
    tangent = jnp.where(overlap == 0, 0, tangent)
    cosine = 1 / jnp.sqrt(1 + tangent**2)
    return cosine, cosine * tangent


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
