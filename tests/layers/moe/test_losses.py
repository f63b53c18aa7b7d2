import math

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe import losses


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        # Importance (1, 1): no variation.
        ([[0.75, 0.25], [0.25, 0.75]], 0.0),
        # Importance (1.5, 0.5): mean 1, variance 1/4.
        ([[0.75, 0.25], [0.75, 0.25]], 0.25),
        # Importance (2, 0, 0, 0): mean 1/2, variance 3/4.
        ([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], 3.0),
        ([[0.25, 0.25, 0.25, 0.25]], 0.0),
        ([[0.0, 0.0]], 0.0),
    ],
)
def test_importance_by_hand(probabilities, expected):
    loss = losses.importance_loss(jnp.array(probabilities))
    np.testing.assert_allclose(loss, expected, atol=1e-7)


def test_importance_is_taken_group_by_group():
    first, second = [[0.75, 0.25]], [[0.25, 0.75]]
    loss = losses.importance_loss(jnp.array([first, second]))
    np.testing.assert_allclose(loss, [0.25, 0.25], atol=1e-7)


def chance(standard_deviations):
    """1 - Φ."""
    return 0.5 * math.erfc(standard_deviations / math.sqrt(2))


def test_load_by_hand():
    # Logits (1, 0) and threshold 1, noise of deviation 1/2: the experts need 0 and 2
    # deviations. The other token needs 1 and 3.
    logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    threshold = jnp.array([1.0, 1.5])
    first = (chance(0) + chance(1)) / 2
    second = (chance(2) + chance(3)) / 2
    expected = ((first - second) / (first + second)) ** 2
    loss = losses.load_loss(logits, threshold, 0.5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_load_of_equal_logits_is_zero():
    logits = jnp.full((3, 5, 4), 0.3)
    loss = losses.load_loss(logits, jnp.full((3, 5), 0.9), 0.25)
    np.testing.assert_allclose(loss, np.zeros(3), atol=1e-12)
