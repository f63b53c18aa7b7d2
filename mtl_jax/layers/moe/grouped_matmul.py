"""Products of rows sorted by expert with the kernels of their experts.

Which is fast depends on the platform: `ragged_dot` multiplies every row with every
kernel on CPUs and NVIDIA GPUs. Megablox, what XLA for TPUs makes of `ragged_dot`, and
the kernels for Hopper GPUs multiply whole tiles of rows, once for each expert that has
rows in them; how many more rows that makes is said at `row_tile`, `ragged_dot` and
`hopper`. No count of operations shows it: for `mtl_jax.flops.count_flops` they are
those of the rows that there are, and for XLA those of all that there is room for.
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

ROW_TILES = (512, 256, 128)
"""Rows of a tile on TPUs; fewer would leave their matrix units waiting for kernels."""

_COLUMNS = 768
_BLOCK_BYTES = 12 * 2**20
"""What two tiles of rows and two of a kernel may take of the 16 MiB beside a core."""


def row_tile(num_rows: int, num_experts: float) -> int:
    """Rows of the tiles that each expert's rows are padded to for `megablox`.

    The kernel multiplies whole tiles, once for each expert with rows in them. With
    padding no two experts share one, and less than a tile is multiplied in vain for
    each. The result is the largest tile that bounds this by a tenth of the rows, or
    else the smallest of `ROW_TILES`: where an expert has fewer than 1,280 rows, about
    half a tile more than its rows is multiplied, at least one tile.

    Args:
      num_rows: Rows to expect.
      num_experts: Experts that they are for, a mean over devices.
    """
    bounded = (tile for tile in ROW_TILES if 10 * num_experts * tile <= num_rows)
    return next(bounded, ROW_TILES[-1])


def ragged_dot(
    rows: Float[Array, "rows width"],
    kernel: Float[Array, "experts width features"],
    count: Int[Array, " experts"],
) -> Float[Array, "rows features"]:
    """``jax.lax.ragged_dot``.

    XLA for TPUs multiplies tiles of 128 rows, as `megablox` does. Rows are not padded
    for it: in all, up to 128 rows an expert are multiplied once more.
    """
    return jax.lax.ragged_dot(rows, kernel, count)


def megablox(
    rows: Float[Array, "rows width"],
    kernel: Float[Array, "experts width features"],
    count: Int[Array, " experts"],
    *,
    tile: int,
    interpret: bool = False,
) -> Float[Array, "rows features"]:
    """The Pallas kernel for TPUs that JAX has (MegaBlocks; Gale et al., 2023).

    Tiles of rows behind the last expert's are left out, and what the product has there
    is not defined; the gradient of such rows is zero.

    Args:
      rows: Rows sorted by expert, a multiple of ``tile``.
      kernel: One kernel an expert.
      count: Rows of each expert. A tile that several share is multiplied for each.
      tile: Rows of a tile.
      interpret: Whether to emulate it on another platform.
    """
    product: Array = _megablox(tile, interpret, rows, kernel, count)
    return product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _megablox(tile, interpret, rows, kernel, count):
    return _gmm(rows, kernel, count, tile=tile, interpret=interpret)


def _megablox_forward(tile, interpret, rows, kernel, count):
    return _megablox(tile, interpret, rows, kernel, count), (rows, kernel, count)


def _megablox_backward(tile, interpret, residuals, cotangent):
    rows, kernel, count = residuals
    rows_gradient = _gmm(
        cotangent, kernel, count, transpose_rhs=True, tile=tile, interpret=interpret
    )
    rows_gradient = _zero_behind(rows_gradient, count)
    with _their_promotion():
        kernel_gradient = tgmm(
            rows.swapaxes(0, 1),
            cotangent,
            count,
            kernel.dtype,
            (tile, *map(_columns, kernel.shape[1:])),
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

    The product and the gradient of the rows multiply all rows of the array, in blocks
    of 128, and one block more for each expert but one, whatever ``count`` is. The
    gradient of the kernels takes blocks of 64 for each expert that has rows in them.

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


def _gmm(rows, kernel, count, *, transpose_rhs=False, tile: int, interpret: bool):
    features = kernel.shape[1 if transpose_rhs else 2]
    with _their_promotion():
        return gmm(
            rows,
            kernel,
            count,
            rows.dtype,
            (tile, *_kernel_tile(tile, rows.shape[1], features, rows.dtype.itemsize)),
            transpose_rhs=transpose_rhs,
            interpret=interpret,
        )


def _kernel_tile(tile: int, width: int, features: int, itemsize: int):
    """Rows and columns of a tile of a kernel: all rows, where there is room.

    Then it stays for all tiles of its expert's rows; else it comes anew for each.
    """
    room = _BLOCK_BYTES // (2 * width * itemsize) - tile
    if room < 256:
        return _columns(width), _columns(features)
    return width, _columns(features, min(room, _COLUMNS))


def _columns(size: int, most: int = _COLUMNS) -> int:
    """Columns of a tile. The last tile is multiplied whole, so little lies beyond."""
    if size <= most:
        return size
    return min(range(256, most + 1, 128), key=lambda tile: (-size % tile, -tile))


def _zero_behind(rows: Array, count: Array) -> Array:
    """The rows, zero behind the last expert's."""
    there = jnp.arange(rows.shape[0], dtype=count.dtype) < jnp.sum(count)
    return jnp.where(there[:, None], rows, 0)


@contextlib.contextmanager
def _their_promotion() -> Iterator[None]:
    """The kernels mix types and ranks, whatever the program around them allows."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
