import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.patch import (
    ConvolutionalStem,
    PatchEmbedding,
    patchify,
    resize_positions,
    sincos_position_embedding,
    to_pixels,
    unpatchify,
)


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


@pytest.mark.parametrize(
    ("shape", "patch_size"),
    [((1, 7, 8, 3), 4), ((1, 8, 7, 3), 4), ((1, 8, 8, 3), 0), ((1, 8, 8, 3), -4)],
)
def test_patches_that_do_not_tile_the_image_are_refused(shape, patch_size):
    size = f"{shape[1]}x{shape[2]}"
    with pytest.raises(ValueError, match=f"patch_size is {patch_size}, .* {size} pix"):
        patchify(jnp.zeros(shape), patch_size)


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


def test_resized_positions_by_hand():
    """Keys' kernel with a = -0.75 at distances 0.25, 0.75, 1.25 and 1.75.

    They are 0.87890625, 0.26171875, -0.10546875 and -0.03515625. Between three points
    and six, every new one lies a quarter to one side of an old one.
    """
    near, middle, far, farthest = 0.87890625, 0.26171875, -0.10546875, -0.03515625
    old = np.array([1.0, 10.0, 100.0])
    a, b, c = old
    new = [
        # Points beyond the border are as the one at the border.
        farthest * a + middle * a + near * a + far * b,
        far * a + near * a + middle * b + farthest * c,
        farthest * a + middle * a + near * b + far * c,
        far * a + near * b + middle * c + farthest * c,
        farthest * a + middle * b + near * c + far * c,
        far * b + near * c + middle * c + farthest * c,
    ]
    rows = resize_positions(jnp.array(old, jnp.float32).reshape(3, 1, 1), 6, 1)
    np.testing.assert_allclose(rows.ravel(), new, rtol=1e-5)
    columns = resize_positions(jnp.array(old, jnp.float32).reshape(1, 3, 1), 1, 6)
    np.testing.assert_allclose(columns.ravel(), new, rtol=1e-5)


def test_resized_positions_are_interpolated_along_either_axis_channel_by_channel():
    rows, columns = (np.random.default_rng(0).normal(size=(n, 2)) for n in (3, 5))
    product = jnp.array(rows[:, None] * columns[None], jnp.float32)

    def resize(line, size):
        line = jnp.array(line, jnp.float32)[:, None]
        return np.asarray(resize_positions(line, size, 1))[:, 0]

    np.testing.assert_allclose(
        resize_positions(product, 4, 3),
        resize(rows, 4)[:, None] * resize(columns, 3)[None],
        rtol=1e-4,
        atol=1e-5,
    )


def test_positions_of_the_same_grid_stay_the_same():
    positions = jax.random.normal(jax.random.key(0), (3, 5, 2))
    assert resize_positions(positions, 3, 5) is positions


def test_bytes_become_floats_from_minus_one_to_one():
    images = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(to_pixels(images, 3).ravel(), [-1, -0.6, 1], rtol=1e-6)
    floats = jnp.array([-1.0, 0.5, 1.0]).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(to_pixels(floats, 3), floats)


def test_grey_is_repeated():
    grey = jnp.array([[0.5], [-0.5]]).reshape(1, 2, 1, 1)
    expected = [[[[0.5] * 3], [[-0.5] * 3]]]
    assert to_pixels(grey, 3).tolist() == expected


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="2 channels; this trunk takes 1 or 3"):
        to_pixels(jnp.zeros((1, 2, 2, 2)), 3)


def test_a_linear_embedding_is_a_product_of_patches():
    pixels = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    embedding = PatchEmbedding(width=8, patch_size=2)
    params = nn.unbox(embedding.init(jax.random.key(1), pixels))["params"]
    params["projection"]["bias"] = jnp.arange(8.0)
    tokens = embedding.apply({"params": params}, pixels)
    patches = np.asarray(patchify(pixels, 2), np.float64)
    kernel = np.asarray(params["projection"]["kernel"], np.float64)
    expected = patches @ kernel + np.arange(8)
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_without_bias_has_none():
    pixels = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    embedding = PatchEmbedding(width=8, patch_size=2, use_bias=False)
    params = nn.unbox(embedding.init(jax.random.key(1), pixels))["params"]
    assert set(params["projection"]) == {"kernel"}
    assert embedding.apply({"params": params}, jnp.zeros((1, 2, 2, 3))).tolist() == [
        [[[0.0] * 8]]
    ]


def test_pixels_are_normalised_as_published():
    levels = np.random.default_rng(0).uniform(size=(2, 4, 4, 3))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    plain = PatchEmbedding(width=5, patch_size=2)
    normalised = PatchEmbedding(width=5, patch_size=2, mean=mean, std=std)
    pixels = jnp.array(2 * levels - 1, jnp.float32)
    variables = nn.unbox(plain.init(jax.random.key(1), pixels))
    expected = jnp.array((levels - mean) / std, jnp.float32)
    np.testing.assert_allclose(
        normalised.apply(variables, pixels),
        plain.apply(variables, expected),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("field", ["mean", "std"])
def test_a_mean_and_a_deviation_are_for_all_channels_or_for_each(field):
    embedding = PatchEmbedding(width=5, patch_size=2, **{field: (0.5, 0.4)})
    with pytest.raises(ValueError, match=f"embedding.{field} is .*3 channels"):
        embedding.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))


def convolution(x, kernel, bias):
    """A 3x3 convolution of stride 2 with zeros around, pixel by pixel, in float64.

    Rows of ``kernel`` are the window's pixels row by row, then channels.
    """
    batch, height, width, channels = x.shape
    padded = np.zeros((batch, height + 2, width + 2, channels))
    padded[:, 1:-1, 1:-1] = x
    result = np.zeros((batch, height // 2, width // 2, kernel.shape[1]))
    for b, r, c in np.ndindex(*result.shape[:3]):
        window = padded[b, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3]
        result[b, r, c] = window.ravel() @ kernel + bias
    return result


def depthwise_convolution(x, kernel):
    """A 3x3 convolution of each channel by itself, with zeros around, in float64."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    result = np.zeros_like(x)
    for r, c in np.ndindex(*x.shape[1:3]):
        window = padded[:, r : r + 3, c : c + 3].reshape(len(x), 9, -1)
        result[:, r, c] = np.einsum("bnc,nc->bc", window, kernel)
    return result


def norm_and_gelu(x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_a_convolutional_stem_against_float64():
    pixels = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    stem = ConvolutionalStem(width=8, patch_size=4)
    params = nn.unbox(stem.init(jax.random.key(1), pixels))["params"]
    x = np.asarray(pixels, np.float64)
    for i, width in enumerate((4, 8)):
        layer = jax.tree.map(np.asarray, params[f"convolution_{i}"])
        x = norm_and_gelu(convolution(x, layer["kernel"], layer["bias"]))
        assert x.shape[-1] == width
    x = x + depthwise_convolution(x, np.asarray(params["depthwise"]))
    projection = jax.tree.map(np.asarray, params["projection"])
    expected = x @ projection["kernel"] + projection["bias"]
    tokens = stem.apply({"params": params}, pixels)
    assert tokens.shape == (2, 2, 3, 8)
    np.testing.assert_allclose(tokens, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("patch_size", "message"),
    [(3, "power of 2"), (1, "power of 2"), (0, "power of 2"), (8, "does not divide")],
)
def test_a_convolutional_stem_that_does_not_fit_is_refused(patch_size, message):
    stem = ConvolutionalStem(width=8, patch_size=patch_size)
    with pytest.raises(ValueError, match=f"patch_size is {patch_size}.*{message}"):
        stem.init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
