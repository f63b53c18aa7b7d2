"""Preferences among tasks, in the methods that take them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import optim
from mtl_jax.optim.aligned_mtl import weights as aligned_mtl_weights
from mtl_jax.optim.dualproj import weights as dualproj_weights
from mtl_jax.optim.upgrad import weights as upgrad_weights

METHODS = {
    "aligned_mtl": (optim.aligned_mtl, aligned_mtl_weights),
    "dualproj": (optim.dualproj, dualproj_weights),
    "upgrad": (optim.upgrad, upgrad_weights),
}
every_method = pytest.mark.parametrize("name", METHODS)


def make_gramian(num_tasks=4, num_params=6):
    rows = np.random.default_rng(num_tasks).normal(size=(num_tasks, num_params))
    return jnp.asarray(rows @ rows.T, jnp.float32)


@functools.cache
def jitted(name):
    weigh = METHODS[name][1]
    return jax.jit(lambda *inputs: weigh(*inputs[:2], preference=inputs[2]))


def weights_of(name, preference, active=None, gramian=None):
    gramian = make_gramian() if gramian is None else gramian
    active = jnp.ones(len(gramian), bool) if active is None else active
    preference = jnp.asarray(preference, jnp.float32)
    return np.asarray(jitted(name)(gramian, active, preference))


@every_method
def test_equal_preference_is_the_default(name):
    expected = jax.jit(METHODS[name][1])(make_gramian())
    np.testing.assert_allclose(weights_of(name, [0.25] * 4), expected, rtol=1e-5)
    summed = 4 * np.asarray(expected)
    np.testing.assert_allclose(weights_of(name, [1.0] * 4), summed, rtol=1e-5)


@pytest.mark.parametrize("name", ["aligned_mtl", "upgrad"])
def test_these_are_linear_in_the_preference(name):
    single = [weights_of(name, preference) for preference in np.eye(4)]
    mixed = weights_of(name, [0.5, 2.0, 0.0, 1.0])
    expected = 0.5 * single[0] + 2 * single[1] + single[3]
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_aligned_gradients_are_orthogonal_and_of_one_length():
    # Column i of B aligns gradient i: Bᵀ G B is the least eigenvalue of G times 1.
    columns = np.stack([weights_of("aligned_mtl", row) for row in np.eye(4)], axis=1)
    gramian = np.asarray(make_gramian(), np.float64)
    least = np.linalg.eigvalsh(gramian)[0]
    np.testing.assert_allclose(
        columns.T @ gramian @ columns, least * np.eye(4), atol=1e-5
    )


def test_of_one_task_alone_both_projections_agree():
    # Either projects that task's gradient onto the dual cone.
    for preference in np.eye(4):
        gramian = np.asarray(make_gramian())
        projected = weights_of("dualproj", preference)
        expected = weights_of("upgrad", preference)
        np.testing.assert_allclose(projected, expected, atol=1e-5)
        assert np.all(gramian @ projected >= -1e-5)
        lift = projected - preference
        np.testing.assert_allclose(lift * (gramian @ projected), 0, atol=1e-5)


@every_method
def test_inactive_tasks_leave_their_part_to_the_others(name):
    active = jnp.array([True, False, True, True])
    weights = weights_of(name, [0.4, 0.4, 0.1, 0.1], active)
    kept = np.flatnonzero(active)
    gramian = make_gramian()[kept][:, kept]
    expected = weights_of(name, [2 / 3, 1 / 6, 1 / 6], gramian=gramian)
    np.testing.assert_allclose(weights[kept], expected, rtol=1e-4)
    assert weights[1] == 0


@every_method
def test_no_preferred_task_is_active(name):
    active = jnp.array([False, True, True, True])
    weights = weights_of(name, [1.0, 0, 0, 0], active)
    np.testing.assert_array_equal(weights, 0)


@every_method
def test_the_aggregator_takes_it(name):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    aggregator = METHODS[name][0](2, preference=[0.9, 0.1])
    _, state = jax.jit(aggregator.update)(rows, aggregator.init(rows[0]))
    expected = weights_of(name, [0.9, 0.1], gramian=optim.gramian(rows))
    np.testing.assert_allclose(state.weights, expected, rtol=1e-5)


@every_method
@pytest.mark.parametrize(
    "preference", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("inf")]]
)
def test_what_is_no_preference_is_refused(name, preference):
    with pytest.raises(ValueError, match="pass 2 numbers"):
        METHODS[name][0](2, preference=preference)


def test_aligned_mtl_refuses_other_scales():
    with pytest.raises(ValueError, match='"min", "median" or "rmse"'):
        optim.aligned_mtl(2, scale="max")  # pyright: ignore[reportArgumentType]


def test_dualproj_worked_regularization():
    # From the rows (-4, 1, 1) and (6, 1, 1).
    gramian = jnp.array([[18.0, -22], [-22, 38]])
    result = dualproj_weights(gramian, regularization=1e-4)
    np.testing.assert_allclose(result, (0.610921, 0.5), atol=1e-6)
