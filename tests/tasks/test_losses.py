import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.tasks import huber, labelled, softmax_cross_entropy, squared_error

NAN = np.nan


def test_labels_are_everything_but_minus_one_and_nan():
    assert labelled(jnp.array([0, -1, 3])).tolist() == [True, False, True]
    assert labelled(jnp.array([0.0, NAN, -1.0])).tolist() == [True, False, True]


def test_cross_entropy_by_hand():
    # softmax of (0, ln 3) is (1/4, 3/4): the losses are ln 4 and ln 4/3.
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]))
    values, valid = softmax_cross_entropy(logits, jnp.array([0, 1, -1]))
    np.testing.assert_allclose(values, [np.log(4), np.log(4 / 3), 0.0], rtol=1e-6)
    assert valid.tolist() == [True, True, False]


def test_cross_entropy_of_a_map_against_float64():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=5, size=(2, 3, 4, 5)).astype(np.float32)
    target = rng.integers(-1, 5, size=(2, 3, 4)).astype(np.int32)
    values, valid = softmax_cross_entropy(jnp.array(logits), jnp.array(target))
    wide = logits.astype(np.float64)
    log_sum = np.log(np.exp(wide).sum(-1))
    for place in np.ndindex(*target.shape):
        known = target[place] >= 0
        expected = log_sum[place] - wide[place][target[place]] if known else 0.0
        assert valid[place] == known
        np.testing.assert_allclose(values[place], expected, rtol=1e-5, atol=1e-6)


def test_squared_error_by_hand():
    values, valid = squared_error(
        jnp.array([3.0, 1.0, 7.0]), jnp.array([1.0, 1.0, NAN])
    )
    assert values.tolist() == [2.0, 0.0, 0.0]
    assert valid.tolist() == [True, True, False]


@pytest.mark.parametrize(
    # Within delta half the square; beyond it delta * (|error| - delta / 2).
    ("error", "delta", "expected"),
    [(0.5, 1.0, 0.125), (-3.0, 1.0, 2.5), (3.0, 2.0, 4.0), (-2.0, 2.0, 2.0)],
)
def test_huber_by_hand(error, delta, expected):
    values, valid = huber(jnp.array([error + 1.0]), jnp.array([1.0]), delta)
    assert values.tolist() == [expected]
    assert valid.tolist() == [True]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("loss", [squared_error, huber])
def test_narrow_predictions_are_penalised_in_float32(loss, dtype):
    values, _ = loss(jnp.ones(2, dtype), jnp.array([1.001, NAN], jnp.float32))
    assert values.dtype == jnp.float32
    # The error of 0.001 is lost if the target is rounded to bfloat16.
    np.testing.assert_allclose(values, [0.5e-6, 0.0], rtol=1e-3)


def test_narrow_logits_are_penalised_in_float32():
    values, _ = softmax_cross_entropy(jnp.zeros((1, 3), jnp.bfloat16), jnp.array([1]))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [np.log(3)], rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "expected"),
    [
        # d/dz of the log-likelihood: softmax minus the one-hot class.
        (
            softmax_cross_entropy,
            [[0.0, 0.0], [9.0, -9.0]],
            np.array([0, -1], np.int32),
            [[-0.5, 0.5], [0.0, 0.0]],
        ),
        (squared_error, [3.0, 5.0], np.array([1.0, NAN], np.float32), [2.0, 0.0]),
        (huber, [3.0, 5.0], np.array([1.0, NAN], np.float32), [1.0, 0.0]),
    ],
)
def test_what_is_unlabelled_has_no_gradient(loss, prediction, target, expected):
    def total(prediction):
        return jnp.sum(loss(prediction, jnp.array(target))[0])

    gradient = jax.jit(jax.grad(total))(jnp.array(prediction, jnp.float32))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("loss", [squared_error, huber])
def test_an_infinite_prediction_of_an_unlabelled_element_is_harmless(loss):
    def total(prediction):
        return jnp.sum(loss(prediction, jnp.array([1.0, NAN]))[0])

    value, gradient = jax.value_and_grad(total)(jnp.array([1.0, jnp.inf]))
    assert value == 0.0
    assert gradient.tolist() == [0.0, 0.0]
