"""Methods whose weights do not depend on the gradients: constant and random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import optim

ROWS = jnp.array([[1.0, 0], [-1, 1], [2, 3]])


def test_constant_weights_stay_as_they_are():
    aggregator = optim.constant(3, (0.5, 2.0, -1.0))
    state = aggregator.init(ROWS[0])
    # 0.5 (1, 0) + 2 (-1, 1) - (2, 3); then without the last.
    direction, state = jax.jit(aggregator.update)(ROWS, state)
    np.testing.assert_allclose(direction, (-3.5, -1))
    np.testing.assert_allclose(state.weights, (0.5, 2, -1))
    active = jnp.array([True, True, False])
    direction, _ = aggregator.update(ROWS, state, active=active)
    np.testing.assert_allclose(direction, (-1.5, 2))


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 2.0, float("nan"))])
def test_constant_refuses_weights_that_do_not_fit(weights):
    with pytest.raises(ValueError, match="pass 3 finite numbers"):
        optim.constant(3, weights)


def test_random_weights_are_a_softmax_of_normals():
    aggregator = optim.random(3, seed=4)
    update, state = jax.jit(aggregator.update), aggregator.init(ROWS[0])
    drawn = []
    for _ in range(400):
        direction, state = update(ROWS, state)
        drawn.append(np.asarray(state.weights))
        np.testing.assert_allclose(direction, drawn[-1] @ ROWS, atol=1e-5)
    drawn = np.array(drawn)
    np.testing.assert_allclose(drawn.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(drawn.mean(axis=0), 1 / 3, atol=0.05)
    # Differences of the logs are differences of two independent normals.
    spread = np.log(drawn[:, 0] / drawn[:, 1])
    np.testing.assert_allclose(spread.std(), np.sqrt(2), rtol=0.12)
    assert abs(spread.mean()) < 0.25

    active = jnp.array([True, False, True])
    _, state = update(ROWS, state, active=active)
    assert state.weights[1] == 0
    np.testing.assert_allclose(jnp.sum(state.weights), 1, rtol=1e-6)
