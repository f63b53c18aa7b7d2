"""Products of rows sorted by expert with the kernels of their experts.

Which is fast depends on the platform: `ragged_dot` multiplies every row with every
kernel on a CPU and, unless told otherwise, on NVIDIA GPUs, and so does the gradient of
its kernels on a TPU; Megablox multiplies each row once in all three products there.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

TILE = 512


def ragged_dot(
    rows: Float[Array, "rows width"],
    kernel: Float[Array, "experts width features"],
    count: Int[Array, " experts"],
) -> Float[Array, "rows features"]:
    """``jax.lax.ragged_dot``."""
    return jax.lax.ragged_dot(rows, kernel, count)


def megablox(
    rows: Float[Array, "rows width"],
    kernel: Float[Array, "experts width features"],
    count: Int[Array, " experts"],
    *,
    interpret: bool = False,
) -> Float[Array, "rows features"]:
    """The Pallas kernel for TPUs that JAX has (MegaBlocks; Gale et al., 2023).

    Tiles of rows behind the last expert's are left out, and what the product has there
    is not defined; the gradient of such rows is zero.

    Args:
      rows: Rows sorted by expert.
      kernel: One kernel an expert.
      count: Rows of each expert.
      interpret: Whether to emulate it on another platform.
    """
    num_rows = rows.shape[0]
    tile = _row_tile(num_rows, count.size)
    rows = jnp.pad(rows, ((0, -num_rows % tile), (0, 0)))
    product: Array = _megablox(interpret, rows, kernel, count)
    return product[:num_rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _megablox(interpret, rows, kernel, count):
    return _gmm(rows, kernel, count, interpret=interpret)


def _megablox_forward(interpret, rows, kernel, count):
    return _megablox(interpret, rows, kernel, count), (rows, kernel, count)


def _megablox_backward(interpret, residuals, cotangent):
    rows, kernel, count = residuals
    rows_gradient = _gmm(
        cotangent, kernel, count, transpose_rhs=True, interpret=interpret
    )
    there = jnp.arange(rows.shape[0], dtype=count.dtype) < jnp.sum(count)
    rows_gradient = jnp.where(there[:, None], rows_gradient, 0)
    with _their_promotion():
        kernel_gradient = tgmm(
            rows.swapaxes(0, 1),
            cotangent,
            count,
            kernel.dtype,
            _tiling(rows, kernel.shape[2], count.size),
            interpret=interpret,
        )
    return rows_gradient, kernel_gradient, None


_megablox.defvjp(_megablox_forward, _megablox_backward)


def _gmm(rows, kernel, count, *, transpose_rhs: bool = False, interpret: bool):
    features = kernel.shape[1 if transpose_rhs else 2]
    with _their_promotion():
        return gmm(
            rows,
            kernel,
            count,
            rows.dtype,
            _tiling(rows, features, count.size),
            transpose_rhs=transpose_rhs,
            interpret=interpret,
        )


def _tiling(rows: Array, features: int, num_experts: int) -> tuple[int, int, int]:
    num_rows, width = rows.shape
    return _row_tile(num_rows, num_experts), min(TILE, width), min(TILE, features)


def _row_tile(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: half as many where experts have few.

    A tile is multiplied once for each expert that has rows in it, and the last one is
    filled up. Yet smaller ones would wait for kernels, which come anew for every tile.
    """
    tile = TILE if num_rows >= TILE * num_experts else TILE // 2
    return min(tile, num_rows)


@contextlib.contextmanager
def _their_promotion() -> Iterator[None]:
    """The kernels mix types and ranks, whatever the program around them allows."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
