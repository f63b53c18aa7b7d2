"""What Megablox multiplies: whole tiles, by its own plan of them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from visited import at_random, visited_rows

from mtl_jax.layers.moe import MoE, dispatch, grouped_matmul
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.layers.moe.grouped_matmul import ROW_TILES, row_tile


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "tile"),
    [(40_960, 32, 128), (20_480, 8, 256), (12_544, 2, 512)],
)
@pytest.mark.parametrize("load", ["even", "random", "skewed", "worst"])
def test_no_more_than_a_tenth_is_multiplied_in_vain(num_rows, num_experts, tile, load):
    assert row_tile(num_rows, num_experts) == tile
    count = at_random(num_rows, num_experts)
    if load == "even":
        count[:] = num_rows // num_experts
    if load == "skewed":
        count[1:] //= np.arange(2, num_experts + 1)
        count[0] = num_rows - sum(count[1:])
    if load == "worst":
        # One row in the last tile of all experts but one.
        count[1:] = count[1:] // tile * tile + 1
        count[0] = num_rows - sum(count[1:])
    assert sum(count) == num_rows
    assert num_rows <= visited_rows(count, tile) <= 1.1 * num_rows


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "padded", "shared"),
    # A ViT-B/16 with 32 experts, of which a token goes to two: 8, 64 and 128
    # images.
    [
        (3_136, 32, 1.31, 2.29),
        (25_088, 32, 1.10, 1.15),
        (50_176, 32, 1.04, 1.07),
    ],
)
def test_few_rows_an_expert(num_rows, num_experts, padded, shared):
    count = at_random(num_rows, num_experts)
    tile = row_tile(num_rows, num_experts)
    found = [visited_rows(count, tile, is_padded) for is_padded in (True, False)]
    np.testing.assert_allclose(np.divide(found, num_rows), (padded, shared), atol=0.01)


@pytest.mark.parametrize("count", [[5, 0, 700, 512], [0, 0, 1]])
def test_tiles_that_no_experts_share_are_visited_once(count):
    tile = 128
    tiles = sum(math.ceil(rows / tile) for rows in count)
    assert visited_rows(count, tile) == tiles * tile
    assert tiles * tile <= dispatch.most_padded(sum(count), len(count), (tile,))


def test_a_layer_gives_whole_tiles_of_one_experts_rows(monkeypatch):
    layer = MoE(
        num_experts=4,
        expert_hidden=8,
        group_size=1,
        capacity_factor=None,
        execution=Execution("all_gather", "sorted", "megablox"),
    )
    given = []

    def product(rows, kernel, count, *, tile):
        given.append((rows.shape[0], count, tile))
        return rows @ kernel[0]

    monkeypatch.setattr(grouped_matmul, "megablox", product)
    x = jnp.ones((2, 60, 6))
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nn.unbox(shapes))
    given.clear()
    with jax.disable_jit():
        layer.apply(zeros, x, train=False)
    # Gates that are all equal send the 120 tokens to the same two experts; any four
    # could have 240 rows in five tiles at most.
    given = [(num_rows, count.tolist(), tile) for num_rows, count, tile in given]
    assert given == 2 * [(5 * 128, [128, 128, 0, 0], 128)]


@pytest.mark.parametrize(
    ("width", "hidden"), [(192, 768), (768, 3072), (1280, 5120), (1536, 6144)]
)
@pytest.mark.parametrize("tile", ROW_TILES)
def test_kernels_of_published_sizes_come_in_tiles_without_a_rest(
    width, hidden, tile, monkeypatch
):
    tilings = []

    def product(rows, other, count, dtype, tiling, transpose_rhs=False, **_):
        tilings.append(tiling)
        if other.ndim == 2:
            return jnp.zeros((count.size, rows.shape[0], other.shape[1]), dtype)
        columns = other.shape[1 if transpose_rhs else 2]
        return jnp.zeros((rows.shape[0], columns), dtype)

    monkeypatch.setattr(grouped_matmul, "gmm", product)
    monkeypatch.setattr(grouped_matmul, "tgmm", product)

    def gradients(rows, kernel, count):
        multiply = functools.partial(grouped_matmul.megablox, count=count, tile=tile)
        product, pull_back = jax.vjp(multiply, rows, kernel)
        return pull_back(product)

    rows = jax.ShapeDtypeStruct((1024, width), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((4, width, hidden), jnp.bfloat16)
    jax.eval_shape(gradients, rows, kernel, jax.ShapeDtypeStruct((4,), jnp.int32))
    forward, *_, to_rows, to_kernel = tilings
    sides = [(width, hidden), (hidden, width), (width, hidden)]
    for tiling, (depth, columns) in zip(
        (forward, to_rows, to_kernel), sides, strict=True
    ):
        assert tiling[0] == tile
        assert depth % tiling[1] == columns % tiling[2] == 0
    # A kernel stays for all tiles of an expert's rows, where these are small.
    assert tile > 128 or (forward[1], to_rows[1]) == (width, hidden)


def test_a_width_that_no_tile_divides():
    width = 900
    count = jnp.asarray([130, 0, 256], jnp.int32)
    padded = dispatch.padded_count(count, (128,))
    random = np.random.default_rng(0)
    rows = jnp.float32(random.normal(size=(640, 16)))
    kernel = jnp.float32(random.normal(size=(3, 16, width)))
    product = functools.partial(grouped_matmul.megablox, tile=128, interpret=True)
    found, pull_back = jax.vjp(lambda *both: product(*both, padded), rows, kernel)
    cotangent = jnp.float32(random.normal(size=found.shape))
    rows_gradient, kernel_gradient = pull_back(cotangent)
    first, last = slice(0, 256), slice(256, 512)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    for mine, expert in ((first, 0), (last, 2)):
        exact = [np.float64(array) for array in (rows, kernel, cotangent)]
        close(found[mine], exact[0][mine] @ exact[1][expert])
        close(rows_gradient[mine], exact[2][mine] @ exact[1][expert].T)
        close(kernel_gradient[expert], exact[0][mine].T @ exact[2][mine])
    np.testing.assert_array_equal(kernel_gradient[1], 0)
