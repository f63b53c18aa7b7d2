import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.heads import Classification, DensePrediction

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
