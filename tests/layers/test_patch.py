import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.patch import patchify, sincos_position_embedding, unpatchify


def test_a_patch_is_the_pixels_of_its_square():
    images = np.random.default_rng(0).normal(size=(2, 6, 9, 2)).astype(np.float32)
    patches = patchify(jnp.array(images), 3)
    assert patches.shape == (2, 2, 3, 18)
    for b, row, column in np.ndindex(2, 2, 3):
        square = images[b, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        np.testing.assert_array_equal(patches[b, row, column], square.ravel())


@pytest.mark.parametrize(
    ("shape", "patch_size"),
    [((2, 6, 9, 2), 3), ((1, 8, 8, 1), 4), ((3, 4, 2, 5), 1), ((1, 4, 4, 3), 4)],
)
def test_unpatchify_undoes_patchify(shape, patch_size):
    images = jax.random.normal(jax.random.key(0), shape)
    patches = patchify(images, patch_size)
    np.testing.assert_array_equal(unpatchify(patches, patch_size), images)


@pytest.mark.parametrize("shape", [(1, 7, 8, 3), (1, 8, 7, 3)])
def test_patches_that_do_not_tile_the_image_are_refused(shape):
    with pytest.raises(ValueError, match="patch_size is 4"):
        patchify(jnp.zeros(shape), 4)


def test_positions_by_their_formula():
    width, (rows, columns) = 8, (3, 4)
    embedding = sincos_position_embedding(rows, columns, width)
    assert embedding.dtype == np.float32
    assert embedding.shape == (rows, columns, width)
    # Two frequencies, 1 and 10000 ** -(1/2), for each of sine and cosine.
    for row, column in np.ndindex(rows, columns):
        expected = [
            *np.sin([row, row / 100]),
            *np.cos([row, row / 100]),
            *np.sin([column, column / 100]),
            *np.cos([column, column / 100]),
        ]
        np.testing.assert_allclose(embedding[row, column], expected, rtol=1e-6)


def test_positions_of_a_larger_grid_begin_like_those_of_a_smaller():
    large, small = (sincos_position_embedding(*s, 16) for s in ((9, 7), (4, 5)))
    np.testing.assert_array_equal(large[:4, :5], small)


@pytest.mark.parametrize("width", [6, 9])
def test_positions_need_a_multiple_of_four_channels(width):
    with pytest.raises(ValueError, match=f"width is {width}.* multiple of 4"):
        sincos_position_embedding(2, 2, width)
