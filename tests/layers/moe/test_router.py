import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe import router


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("noisy", [False, True])
def test_against_numpy(noisy):
    logits, noise = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
    noise_std = 2.0
    shift = noise_std / 5 * noise if noisy else 0.0
    best = np.argsort(-(logits + shift), axis=-1)[..., :3]
    weight = np.take_along_axis(softmax(logits + shift), best, -1)
    clean = softmax(logits)
    counts = np.stack([np.bincount(group.ravel(), minlength=5) for group in best])

    routing = router.route(
        jnp.float32(logits),
        jnp.float32(noise) if noisy else None,
        num_selected=3,
        noise_std=noise_std,
    )
    np.testing.assert_array_equal(routing.expert_index, best)
    np.testing.assert_allclose(routing.weight, weight, rtol=1e-5)
    np.testing.assert_allclose(routing.load, counts / 21, rtol=1e-6)
    entropy = -(clean * np.log(clean)).sum(-1).mean(-1)
    np.testing.assert_allclose(routing.entropy, entropy, rtol=1e-5)
    sums = clean.sum(-2)
    importance = sums.var(-1) / sums.mean(-1) ** 2
    np.testing.assert_allclose(routing.importance_loss, importance, rtol=1e-4)
    if noisy:
        threshold = np.sort(logits + shift, axis=-1)[..., -3]
        needed = (threshold[..., None] - logits) / (noise_std / 5)
        chance = np.vectorize(lambda z: 0.5 * math.erfc(z / math.sqrt(2)))(needed)
        mean = chance.mean(-2)
        load = mean.var(-1) / mean.mean(-1) ** 2
        np.testing.assert_allclose(routing.load_loss, load, rtol=1e-4)
    else:
        np.testing.assert_array_equal(routing.load_loss, np.zeros(3))


def test_largest_breaks_ties_towards_the_lower_index():
    values = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [[1, 2, 3, 0], [0, 1, 2, 3]]
    np.testing.assert_array_equal(router.largest(values, 4), expected)


def test_weights_are_not_renormalised():
    # Softmax of log (4, 3, 2, 1) is (0.4, 0.3, 0.2, 0.1).
    logits = jnp.log(jnp.array([[[4.0, 3.0, 2.0, 1.0]]]))
    routing = router.route(logits, None, num_selected=2)
    np.testing.assert_allclose(routing.weight, [[[0.4, 0.3]]], rtol=1e-6)


def test_uniform_router_has_no_importance_loss_and_greatest_entropy():
    routing = router.route(jnp.zeros((2, 5, 4)), None, num_selected=1)
    np.testing.assert_allclose(routing.importance_loss, np.zeros(2), atol=1e-12)
    np.testing.assert_allclose(routing.entropy, np.full(2, math.log(4)), rtol=1e-6)
    np.testing.assert_array_equal(routing.load, [[1, 0, 0, 0]] * 2)


def test_gradients_by_finite_differences():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 4, 5))
    noise = jnp.float32(rng.normal(size=(1, 4, 5)))

    def loss(logits):
        routing = router.route(logits, noise, num_selected=2)
        squares = jnp.sum(jnp.square(routing.weight))
        return squares + jnp.sum(routing.importance_loss + routing.load_loss)

    gradient = jax.jit(jax.grad(loss))(jnp.float32(logits))
    direction = rng.normal(size=logits.shape)
    step = 1e-3 * direction
    difference = loss(jnp.float32(logits + step)) - loss(jnp.float32(logits - step))
    slope = np.vdot(gradient, direction)
    np.testing.assert_allclose(slope, difference / 2e-3, rtol=2e-2)
