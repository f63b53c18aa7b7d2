"""The published iteration for MGDA, beside the exact minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from mtl_jax import optim
from mtl_jax.optim.frank_wolfe import weights


def length_over_minimum(rows, num_iterations):
    matrix = jnp.asarray(rows @ rows.T, jnp.float32)
    values = np.asarray(weights(matrix, num_iterations=num_iterations), np.float64)
    np.testing.assert_allclose(values.sum(), 1, rtol=1e-5)
    assert np.all(values >= 0)
    shortest = np.linalg.norm(references.mgda(rows))
    return np.linalg.norm(values @ rows) / shortest


def test_two_tasks_are_exact_at_once():
    # Shortest point of the segment: w_1 = (38 + 22) / (18 + 38 + 44).
    rows = np.array([[-4.0, 1, 1], [6, 1, 1]])
    matrix = jnp.asarray(rows @ rows.T, jnp.float32)
    np.testing.assert_allclose(weights(matrix, num_iterations=0), (0.6, 0.4), rtol=1e-5)
    # The shortest point can be a corner.
    matrix = jnp.array([[1.0, 2.0], [2.0, 9.0]])
    np.testing.assert_allclose(weights(matrix), (1, 0), atol=1e-6)


def test_it_approaches_the_minimum_from_above_and_slowly():
    rows = np.random.default_rng(1).normal(size=(8, 16))
    excess = [length_over_minimum(rows, steps) - 1 for steps in (0, 10, 100, 1000)]
    assert excess[0] > excess[1] > excess[2] > excess[3] > -1e-6
    assert excess[1] > 5e-4


def test_absent_tasks_and_degenerate_gradients():
    rows = np.array([[1.0, 0], [5, 5], [-1, 1]], np.float32)
    active = jnp.array([True, False, True])
    values = jax.jit(weights)(jnp.asarray(rows @ rows.T), active)
    np.testing.assert_allclose(values, (0.6, 0, 0.4), atol=1e-6)
    for rows in (np.zeros((3, 2)), np.array([[1.0, 2], [1, 2]])):
        values = weights(jnp.asarray(rows @ rows.T, jnp.float32))
        np.testing.assert_allclose(np.sum(values), 1, rtol=1e-6)
    np.testing.assert_array_equal(weights(jnp.eye(3), jnp.zeros(3, bool)), 0)


def test_aggregator():
    aggregator = optim.mgda_frank_wolfe(2)
    rows = jnp.array([[1.0, 0], [-1, 1]])
    direction, state = aggregator.update(rows, aggregator.init(rows[0]))
    np.testing.assert_allclose(direction, (0.2, 0.4), atol=1e-6)
    np.testing.assert_allclose(state.weights, (0.6, 0.4), atol=1e-6)
    for number in (-1, 10**6 + 1):
        with pytest.raises(ValueError, match=f"num_iterations is {number}; pass 0 to"):
            optim.mgda_frank_wolfe(2, num_iterations=number)
