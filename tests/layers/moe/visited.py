"""Rows that Megablox multiplies, by the plan that it makes itself."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.layers.moe import dispatch

# The package has a function of that name too.
kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def visited_rows(count: np.ndarray, tile: int, padded: bool = True) -> int:
    """Rows of all tiles, each as often as the kernel visits it."""
    count = jnp.asarray(count, jnp.int32)
    sizes = (tile if padded else 1,)
    num_rows = dispatch.most_padded(int(jnp.sum(count)), count.size, sizes)
    num_rows += -num_rows % tile
    return int(_num_tiles(dispatch.padded_count(count, sizes), num_rows, tile)) * tile


@functools.partial(jax.jit, static_argnums=(1, 2))
def _num_tiles(count, num_rows, tile):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return kernels.make_group_metadata(
            group_sizes=count,
            m=num_rows,
            tm=tile,
            start_group=jnp.int32(0),
            num_nonzero_groups=count.size,
            visit_empty_groups=False,
        )[1]


def at_random(num_rows: int, num_experts: int) -> np.ndarray:
    """Rows of each expert where each row goes to any of them."""
    shares = np.full(num_experts, 1 / num_experts)
    return np.random.default_rng(0).multinomial(num_rows, shares)
