"""Products of rows sorted by expert with the kernels of their experts.

Which is fast depends on the platform: `ragged_dot` multiplies every row with every
kernel on CPUs and NVIDIA GPUs, and so does the gradient of its kernels on a TPU.
Megablox, on TPUs, and the kernels for Hopper GPUs multiply each row once in all three
products.
"""

import contextlib
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int, PyTree

from mtl_jax.flops import stated
from mtl_jax.sharding import expert_parallel

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
    rows_gradient = _zero_behind(rows_gradient, count)
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


def hopper(
    rows: Float[Array, "rows width"],
    kernel: Float[Array, "experts width features"],
    count: Int[Array, " experts"],
) -> Float[Array, "rows features"]:
    """The Pallas kernels for NVIDIA's Hopper GPUs that JAX has; see `suits_hopper`.

    What the product has behind the last expert's rows is not defined; the gradient of
    such rows is zero.

    Args:
      rows: Rows sorted by expert.
      kernel: One kernel an expert.
      count: Rows of each expert.
    """
    num_rows = rows.shape[0]
    rows = jnp.pad(rows, ((0, -num_rows % _HOPPER_ROWS), (0, 0)))
    product: Array = _hopper(rows, kernel, count)
    return product[:num_rows]


def suits_hopper(parameters: PyTree) -> bool:
    """Whether `hopper` takes experts of such parameters, ``[experts, ...]`` each.

    It does on its GPUs, where all have one type, of two bytes, and the sides of their
    matrices are multiples of 128.
    """
    leaves = jax.tree.leaves(parameters)
    return is_hopper() and all(
        leaf.dtype == leaves[0].dtype
        and leaf.dtype in (jnp.bfloat16, jnp.float16)
        and (leaf.ndim < 3 or all(side % 128 == 0 for side in leaf.shape[1:]))
        for leaf in leaves
    )


def is_hopper() -> bool:
    """Whether the program is for GPUs of NVIDIA's Hopper generation."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return expert_parallel.platform() == "gpu" and capability == "9.0"


_HOPPER_ROWS = 128


def _hopper_tiles(features: int) -> dict[str, int]:
    """How so many columns of a product are shared out, as measured on an H200."""
    columns = 192 if features % 192 == 0 else 128
    return {
        "block_m": _HOPPER_ROWS,
        "block_n": columns,
        "block_k": 64,
        "max_concurrent_steps": 4,
        "grid_block_n": math.gcd(features // columns, 4),
    }


@jax.custom_vjp
def _hopper(rows, kernel, count):
    return _hopper_product(rows, kernel, count, transpose_rhs=False)


def _hopper_forward(rows, kernel, count):
    return _hopper(rows, kernel, count), (rows, kernel, count)


def _hopper_backward(residuals, cotangent):
    rows, kernel, count = residuals
    rows_gradient = _hopper_product(cotangent, kernel, count, transpose_rhs=True)
    rows_gradient = _zero_behind(rows_gradient, count)
    # Not to be imported where there is no such GPU.
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu as kernels

    features = cotangent.shape[1]
    product = functools.partial(
        kernels.transposed_ragged_dot, **_hopper_tiles(features)
    )
    kernel_gradient = _known(product, rows, cotangent, features, group_sizes=count)
    return rows_gradient, kernel_gradient, None


_hopper.defvjp(_hopper_forward, _hopper_backward)


def _hopper_product(rows, kernel, count, *, transpose_rhs: bool):
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu as kernels

    features = kernel.shape[1 if transpose_rhs else 2]
    product = functools.partial(
        kernels.ragged_dot,
        transpose_rhs=transpose_rhs,
        **_hopper_tiles(features),
    )
    return _known(product, rows, kernel, features, group_sizes=count)


def _known(product, rows, other, features: int, *, group_sizes):
    """A product of all rows, by a kernel that does not say what operations it does."""

    def apply(rows, other, group_sizes):
        return product(rows, other, group_sizes=group_sizes)

    with _their_promotion():
        return stated(apply, 2 * rows.size * features)(rows, other, group_sizes)


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


def _zero_behind(rows: Array, count: Array) -> Array:
    """The rows, zero behind the last expert's."""
    there = jnp.arange(rows.shape[0], dtype=count.dtype) < jnp.sum(count)
    return jnp.where(there[:, None], rows, 0)


@contextlib.contextmanager
def _their_promotion() -> Iterator[None]:
    """The kernels mix types and ranks, whatever the program around them allows."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
