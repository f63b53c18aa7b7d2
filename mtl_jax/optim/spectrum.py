"""Pseudo-inverses of matrices of cosines, for methods that need no sign of weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def eigenvalues_and_vectors(
    matrix: Float[Array, "size size"],
) -> tuple[Float[Array, " size"], Float[Array, "size size"], Bool[Array, " size"]]:
    """Diagonalise a matrix and tell which eigenvalues rounding leaves something of.

    Args:
        matrix: Symmetric positive semidefinite, with a diagonal of order one.

    Returns:
        `(eigenvalues, vectors, kept)`, the vectors in columns; eigenvalues up to
        `size * eps` of the largest are not kept, and read 1.
    """
    eigenvalues, vectors = jnp.linalg.eigh(matrix)
    bound = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * eigenvalues[-1]
    kept = eigenvalues > bound
    return jnp.where(kept, eigenvalues, 1), vectors, kept


def pseudo_inverse(matrix: Float[Array, "size size"]) -> Float[Array, "size size"]:
    """Moore-Penrose inverse of a positive semidefinite matrix of cosines.

    Args:
        matrix: Symmetric positive semidefinite, with a diagonal of order one.

    Returns:
        The inverse on the span of the kept eigenvectors, zero across it.
    """
    eigenvalues, vectors, kept = eigenvalues_and_vectors(matrix)
    half = vectors * jnp.where(kept, 1 / jnp.sqrt(eigenvalues), 0)[None, :]
    return jnp.matmul(half, half.T, precision=jax.lax.Precision.HIGHEST)


def equal_angles(
    cosines: Float[Array, "tasks tasks"], present: Bool[Array, " tasks"]
) -> Float[Array, " tasks"]:
    """Combine unit gradients to a direction with the same inner product with all.

    Args:
        cosines: Inner products of the unit gradients.
        present: Which of them take part; the others are orthogonal to all.

    Returns:
        `C⁺ 1`, or zeros where no direction comes near: where the gradients cancel.
    """
    ones = present.astype(cosines.dtype)
    values = jnp.matmul(
        pseudo_inverse(cosines), ones, precision=jax.lax.Precision.HIGHEST
    )
    values = jnp.where(present, values, 0)
    # Where the gradients cancel, ones is orthogonal to the range of C up to rounding;
    # otherwise some value is at least of the order of one over their number.
    size = cosines.shape[0]
    noise = 16 * size * jnp.finfo(cosines.dtype).eps
    return jnp.where(jnp.max(jnp.abs(values)) > noise, values, 0)
