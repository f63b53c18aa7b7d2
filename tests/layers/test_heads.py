import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.heads import Classification, DensePrediction, UpsamplingHead

FEATURES = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))


def init(head):
    return nn.unbox(head.init(jax.random.key(1), FEATURES))["params"]


def apply(head, params, features=FEATURES):
    return head.apply({"params": params}, features)


def test_classification_is_a_linear_map_of_the_mean_feature():
    head = Classification(num_classes=5)
    kernel = jax.random.normal(jax.random.key(2), (8, 5))
    bias = jnp.arange(5.0)
    logits = apply(head, {"logits": {"kernel": kernel, "bias": bias}})
    mean = np.asarray(FEATURES, np.float64).mean(axis=(1, 2))
    expected = mean @ np.asarray(kernel, np.float64) + np.arange(5)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_classification_starts_undecided():
    head = Classification(num_classes=5)
    assert apply(head, init(head)).tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize(
    ("num_classes", "shape"), [(None, (2, 6, 8)), (1, (2, 6, 8, 1)), (5, (2, 6, 8, 5))]
)
def test_dense_prediction_has_one_value_or_logits_for_each_pixel(num_classes, shape):
    head = DensePrediction(patch_size=2, num_classes=num_classes, hidden=16)
    assert apply(head, init(head)).shape == shape


@pytest.mark.parametrize("num_classes", [None, 3])
def test_pixels_depend_on_the_token_of_their_patch_alone(num_classes):
    head = DensePrediction(patch_size=2, num_classes=num_classes, hidden=16)
    params = init(head)
    before = apply(head, params)
    after = apply(head, params, FEATURES.at[0, 1, 2].add(1.0))
    changed = np.asarray(before != after)
    changed = changed.any(-1) if num_classes else changed
    expected = np.zeros((2, 6, 8), bool)
    expected[0, 2:4, 4:6] = True
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize(
    "head",
    [Classification(5, jnp.bfloat16), DensePrediction(2, 5, 16, jnp.bfloat16)],
    ids=lambda head: type(head).__name__,
)
def test_heads_compute_in_their_dtype_and_keep_float32_parameters(head):
    params = init(head)
    assert apply(head, params, FEATURES.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def doubled_by_hand(x):
    """Values at the centres of pixels half as large, by the two nearest of a side."""
    for axis in (0, 1):
        size = x.shape[axis]
        centres = (np.arange(2 * size) + 0.5) / 2 - 0.5
        low = np.floor(centres)
        part = centres - low
        first, second = (
            np.take(x, np.clip(low + i, 0, size - 1).astype(int), axis) for i in (0, 1)
        )
        shape = [-1 if a == axis else 1 for a in range(3)]
        part = part.reshape(shape)
        x = (1 - part) * first + part * second
    return x


def convolved_by_hand(x, kernel, bias):
    side = kernel.shape[0]
    padded = np.pad(x, 2 * [(side // 2, side // 2)] + [(0, 0)])
    rows, columns, _ = x.shape
    output = np.zeros((rows, columns, kernel.shape[-1])) + bias
    for i in range(side):
        for j in range(side):
            output += padded[i : i + rows, j : j + columns] @ kernel[i, j]
    return output


@pytest.mark.parametrize("num_classes", [3, None])
def test_the_upsampling_head_is_convolutions_between_doublings(num_classes):
    head = UpsamplingHead(patch_size=4, num_classes=num_classes, channels=16)
    features = jax.random.normal(jax.random.key(0), (2, 3, 2, 6))
    params = nn.unbox(jax.jit(head.init)(jax.random.key(1), features))["params"]
    keys = iter(jax.random.split(jax.random.key(2), 20))
    params = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params
    )
    output = jax.jit(head.apply)({"params": params}, features)
    weights = jax.tree.map(lambda p: np.asarray(p, np.float64), params)

    def normalised(x, name, size, axes, epsilon):
        grouped = x.reshape(*x.shape[:2], -1, size)
        mean = grouped.mean(axes, keepdims=True)
        deviation = np.sqrt(grouped.var(axes, keepdims=True) + epsilon)
        grouped = ((grouped - mean) / deviation).reshape(x.shape)
        return grouped * weights[name]["scale"] + weights[name]["bias"]

    for example, found in zip(np.asarray(features, np.float64), output, strict=True):
        x = normalised(example, "norm", 6, -1, 1e-6)
        for i in range(2):
            x = convolved_by_hand(x, **weights[f"convolution_{i}"])
            x = np.maximum(normalised(x, f"norm_{i}", 8, (0, 1, 3), 1e-6), 0)
            if i == 0:
                x = doubled_by_hand(x)
        x = doubled_by_hand(convolved_by_hand(x, **weights["pixels"]))
        expected = x if num_classes else x[..., 0]
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 12}, "patch_size is 12; it must be a power of two"),
        ({"patch_size": 1}, "patch_size is 1; it must be a power of two"),
        ({"patch_size": 4, "channels": 12}, "channels is 12; it must be a multiple"),
    ],
)
def test_the_upsampling_head_explains_its_sizes(fields, message):
    with pytest.raises(ValueError, match=message):
        UpsamplingHead(**fields).init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))
