"""FairGrad and Nash-MTL beyond the table: any exponent, and gradients that cancel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from mtl_jax import optim
from mtl_jax.optim.fairgrad import weights as fairgrad_weights
from mtl_jax.optim.nash_mtl import weights as nash_mtl_weights


@functools.cache
def jitted(alpha):
    return jax.jit(functools.partial(fairgrad_weights, alpha=alpha))


def direction_of(rows, alpha):
    gramian = jnp.asarray(rows @ rows.T, jnp.float32)
    return np.asarray(jitted(alpha)(gramian), np.float64) @ rows


def make_rows(num_tasks, num_params, ratio=1.0):
    rng = np.random.default_rng([num_tasks, num_params])
    rows = rng.normal(size=(num_tasks, num_params))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * rng.permutation(np.geomspace(1, ratio, num_tasks))[:, None]


@pytest.mark.parametrize("alpha", [0.2, 5, 30])
@pytest.mark.parametrize("num_tasks", [3, 12])
def test_any_exponent(alpha, num_tasks):
    for num_params in (2 * num_tasks, num_tasks + 1):
        for ratio in (1, 1e4):
            rows = make_rows(num_tasks, num_params, ratio)
            expected = references.fairgrad(rows, alpha)
            error = np.linalg.norm(direction_of(rows, alpha) - expected)
            assert error <= 1e-4 * np.linalg.norm(expected)


def test_exponent_zero_is_the_sum():
    rows = make_rows(4, 6, ratio=10)
    np.testing.assert_allclose(direction_of(rows, 0), rows.sum(axis=0), rtol=1e-6)


def test_negative_exponent_is_refused():
    with pytest.raises(ValueError, match="0 or more"):
        optim.fairgrad(3, alpha=-0.5)


@pytest.mark.parametrize("alpha", [0.5, 1, 2])
def test_only_tasks_that_cancel_are_held(alpha):
    # The first three cancel in a positive combination and span two dimensions; the
    # fourth lies in that plane. What is left to the last two is in the other two
    # dimensions, where they are (0, 2) and (3, -1).
    rows = np.array(
        [
            [1.0, 0, 0, 0],
            [0, 2, 0, 0],
            [-1, -1, 0, 0],
            [1, 5, 0, 0],
            [7, 1, 0, 2],
            [-2, 0, 3, -1],
        ]
    )
    direction = direction_of(rows, alpha)
    np.testing.assert_allclose(direction[:2], 0, atol=3e-4)
    progress = rows[4:] @ direction
    assert np.all(progress > 0.1)
    expected = progress**-alpha @ rows[4:, 2:]
    np.testing.assert_allclose(direction[2:], expected, rtol=1e-4)


@pytest.mark.parametrize("num_tasks", [2, 5, 40])
def test_nearly_opposite_gradients_still_bargain(num_tasks):
    # All within 0.05 of a plane through zero: Nash-MTL still gives each its due.
    rng = np.random.default_rng(num_tasks)
    rows = rng.normal(size=(num_tasks, num_tasks // 2 + 1))
    rows = np.hstack([rows, 0.05 * np.linalg.norm(rows, axis=1, keepdims=True)])
    gramian = jnp.asarray(rows @ rows.T, jnp.float32)
    weights = np.asarray(jax.jit(nash_mtl_weights)(gramian), np.float64)
    np.testing.assert_allclose(weights * (rows @ (weights @ rows)), 1, rtol=2e-3)


def test_where_a_published_iteration_gives_the_sum():
    # G = [[1, -1], [-1, 2]]: with w_1 = sqrt(2) w_2 both equations G w = 1 / w read
    # w_2² (2 − sqrt(2)) = 1, and the published iteration answers (1, 1).
    result = nash_mtl_weights(jnp.array([[1.0, -1], [-1, 2]]))
    second = 1 / np.sqrt(2 - np.sqrt(2))
    np.testing.assert_allclose(result, (np.sqrt(2) * second, second), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_where_a_published_least_squares_stops_at_its_start(scale):
    # Orthogonal gradients: w_k^(−1/2) = s² n_k² w_k, w_k = (s n_k)^(−4/3).
    norms = scale * np.array([1.0, 100.0])
    result = jitted(2)(jnp.asarray(np.diag(norms**2), jnp.float32))
    np.testing.assert_allclose(result, norms ** (-4 / 3), rtol=1e-5)
