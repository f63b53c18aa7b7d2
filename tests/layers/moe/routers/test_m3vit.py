import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.layers.moe.routers import M3ViT
from mtl_jax.layers.moe.routers.m3vit import m3vit


def test_by_hand():
    # Gates (3, 1)/4 twice and (1, 4)/5. Importance (1.5, 0.8): mean 1.15, unbiased
    # variance 0.7²/2. Load (2, 1): mean 1.5, variance 1/2.
    logits = jnp.log(jnp.array([[[3.0, 1.0], [3.0, 1.0], [1.0, 4.0]]]))
    routing = m3vit(logits, num_selected=1, balance_weight=0.1)
    importance, load = 0.245 / 1.15**2, 0.5 / 1.5**2
    np.testing.assert_allclose(
        routing.losses["importance_loss"], [importance], rtol=1e-5
    )
    np.testing.assert_allclose(routing.losses["load_loss"], [load], rtol=1e-5)
    np.testing.assert_allclose(
        routing.auxiliary_loss, 0.1 * (importance + load), rtol=1e-5
    )
    np.testing.assert_allclose(routing.weight, [[[0.75], [0.75], [0.8]]], rtol=1e-6)


def test_against_the_steps_of_the_released_code():
    """Softmax, top k, gates scattered to the selected, sums over tokens, cv_squared."""
    logits = np.random.default_rng(0).normal(size=(3, 9, 6))
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    top = np.argsort(-gates, axis=-1)[..., :2]
    masked = np.zeros_like(gates)
    np.put_along_axis(masked, top, np.take_along_axis(gates, top, -1), -1)

    def cv_squared(x):
        return x.var(-1, ddof=1) / (x.mean(-1) ** 2 + 1e-10)

    expected = cv_squared(masked.sum(1)) + cv_squared((masked > 0).sum(1))
    routing = m3vit(jnp.float32(logits), num_selected=2)
    np.testing.assert_array_equal(routing.expert_index, top)
    np.testing.assert_allclose(
        routing.auxiliary_loss, 0.01 * expected.mean(), rtol=1e-5
    )


def test_one_expert_has_nothing_to_balance():
    assert m3vit(jnp.ones((1, 3, 1)), num_selected=1).auxiliary_loss == 0.0


def test_gates_start_as_released():
    # torch's kaiming_uniform_(a=√5) of a [width, experts] matrix takes the experts for
    # inputs: the bound is √(1/3)·√(3/experts).
    router = M3ViT(num_experts=16, num_selected=4, num_tasks=3)
    init = router.init(jax.random.key(0), jnp.ones((1, 2, 384)), 0, train=False)
    kernel = np.asarray(init["params"]["gate"]["kernel"].value)
    assert kernel.shape == (3, 384, 16)
    assert np.abs(kernel).max() <= 1 / 4
    deviations = kernel.std(axis=(1, 2))
    np.testing.assert_allclose(deviations, 1 / 4 / np.sqrt(3), rtol=0.03)
    assert not np.allclose(kernel[0], kernel[1])
