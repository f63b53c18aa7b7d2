import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe.routers import Switch
from mtl_jax.layers.moe.routers.switch import switch
from mtl_jax.layers.moe.routing import assigned_fraction


def test_by_hand():
    # Gates (3, 1)/4, (1, 3)/4 and (3, 1)/4: f = (2, 1)/3, P = (7, 5)/12.
    logits = jnp.log(jnp.array([[[3.0, 1.0], [1.0, 3.0], [3.0, 1.0]]]))
    routing = switch(logits, balance_weight=0.5, z_weight=0.25)
    np.testing.assert_array_equal(routing.expert_index, [[[0], [1], [0]]])
    np.testing.assert_allclose(routing.weight, np.full((1, 3, 1), 0.75), rtol=1e-6)
    balance = 2 * (2 / 3 * 7 / 12 + 1 / 3 * 5 / 12)
    np.testing.assert_allclose(routing.losses["switch_loss"], [balance], rtol=1e-6)
    z = np.log(4) ** 2
    np.testing.assert_allclose(routing.losses["z_loss"], [z], rtol=1e-6)
    np.testing.assert_allclose(
        routing.auxiliary_loss, 0.5 * balance + 0.25 * z, rtol=1e-6
    )


def test_gradients_by_finite_differences():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 4, 5))

    @jax.jit
    def loss(logits):
        routing = switch(logits, balance_weight=1.0, z_weight=1.0)
        return jnp.sum(jnp.square(routing.weight)) + routing.auxiliary_loss

    gradient = jax.jit(jax.grad(loss))(jnp.float32(logits))
    direction = rng.normal(size=logits.shape)
    step = 1e-3 * direction
    difference = loss(jnp.float32(logits + step)) - loss(jnp.float32(logits - step))
    slope = np.vdot(gradient, direction)
    np.testing.assert_allclose(slope, difference / 2e-3, rtol=1e-2)


def test_jitter_scales_features_in_training_alone():
    router = Switch(num_experts=64, num_selected=1, jitter=0.1)
    # The logits are the features themselves, which are 1.
    variables = {"params": {"gate": {"kernel": jnp.eye(64)}}}
    tokens = jnp.ones((2, 50, 64))

    @functools.partial(jax.jit, static_argnums=0)
    def probabilities(train):
        rngs = {"router": jax.random.key(0)} if train else None
        return router.apply(variables, tokens, train=train, rngs=rngs).probabilities

    np.testing.assert_allclose(probabilities(False), 1 / 64, rtol=1e-5)
    logits = np.log(probabilities(True))
    spread = logits.max(-1) - logits.min(-1)
    # Of 64 numbers between 0.9 and 1.1.
    assert np.all((spread > 0.1) & (spread < 0.2))


def test_first_choices_spread_without_noise():
    router = Switch(num_experts=4, num_selected=1)
    tokens = jax.random.normal(jax.random.key(0), (1, 1000, 32))
    init = jax.jit(functools.partial(router.init_with_output, train=False))
    routing, _ = init(jax.random.key(1), tokens)
    load = assigned_fraction(routing.expert_index, 4)
    assert np.min(load) > 0.1


def test_more_than_one_expert_is_refused():
    router = Switch(num_experts=4, num_selected=2)
    with pytest.raises(ValueError, match=r"num_selected=2.*set num_selected=1"):
        router.init(jax.random.key(0), jnp.ones((1, 2, 3)), train=False)
