import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe import dispatch
from mtl_jax.layers.moe.gates import ConditionGate
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.layers.moe.routers.noisy_top_k import noisy_top_k
from mtl_jax.layers.moe.routing import entropy, largest


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("noisy", [False, True])
def test_against_numpy(noisy):
    logits, noise = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
    noise_std = 2.0
    shift = noise_std / 5 * noise if noisy else 0.0
    best = np.argsort(-(logits + shift), axis=-1)[..., :3]
    gates = softmax(logits + shift)
    clean = softmax(logits)

    route = functools.partial(
        noisy_top_k,
        num_selected=3,
        noise_std=noise_std,
        importance_weight=1.0,
        load_weight=10.0,
        gshard_weight=100.0,
        z_weight=1000.0,
    )
    routing = jax.jit(route)(jnp.float32(logits), jnp.float32(noise) if noisy else None)
    np.testing.assert_array_equal(routing.expert_index, best)
    expected = np.take_along_axis(gates, best, -1)
    np.testing.assert_allclose(routing.weight, expected, rtol=1e-5)
    np.testing.assert_allclose(routing.probabilities, clean, rtol=1e-5)
    assert routing.priority is None
    sums = clean.sum(-2)
    importance = sums.var(-1) / sums.mean(-1) ** 2
    np.testing.assert_allclose(routing.losses["importance_loss"], importance, rtol=1e-4)
    load = np.zeros(3)
    if noisy:
        threshold = np.sort(logits + shift, axis=-1)[..., -3]
        needed = (threshold[..., None] - logits) / (noise_std / 5)
        chance = np.vectorize(lambda z: 0.5 * math.erfc(z / math.sqrt(2)))(needed)
        mean = chance.mean(-2)
        load = mean.var(-1) / mean.mean(-1) ** 2
    np.testing.assert_allclose(routing.losses["load_loss"], load, rtol=1e-4)
    first = np.stack([np.bincount(g[:, 0], minlength=5) for g in best]) / 7
    gshard = 5 * (first * gates.mean(-2)).sum(-1)
    np.testing.assert_allclose(routing.losses["gshard_loss"], gshard, rtol=1e-5)
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean(-1)
    np.testing.assert_allclose(routing.losses["z_loss"], z, rtol=1e-5)
    total = np.mean(importance + 10 * load + 100 * gshard + 1000 * z)
    np.testing.assert_allclose(routing.auxiliary_loss, total, rtol=1e-5)


def test_losses_of_weight_zero_are_left_out():
    routing = noisy_top_k(jnp.zeros((1, 2, 3)), None, num_selected=1)
    assert set(routing.losses) == {"importance_loss", "load_loss"}


def test_largest_breaks_ties_towards_the_lower_index():
    values = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [[1, 2, 3, 0], [0, 1, 2, 3]]
    np.testing.assert_array_equal(largest(values, 4), expected)


def test_weights_are_not_renormalised():
    # Softmax of log (4, 3, 2, 1) is (0.4, 0.3, 0.2, 0.1).
    logits = jnp.log(jnp.array([[[4.0, 3.0, 2.0, 1.0]]]))
    routing = noisy_top_k(logits, None, num_selected=2)
    np.testing.assert_allclose(routing.weight, [[[0.4, 0.3]]], rtol=1e-6)


def test_uniform_router_has_no_loss_and_greatest_entropy():
    # Without differences between logits, each expert is as likely as the others to be
    # chosen, whatever the noise.
    noise = jax.random.normal(jax.random.key(0), (2, 5, 4))
    routing = noisy_top_k(jnp.zeros((2, 5, 4)), noise, num_selected=1)
    np.testing.assert_allclose(routing.auxiliary_loss, 0.0, atol=1e-12)
    np.testing.assert_allclose(entropy(routing.probabilities), math.log(4), rtol=1e-6)


def kept(logits, capacity, *, batch_priority):
    routing = noisy_top_k(logits, None, num_selected=2, batch_priority=batch_priority)
    return dispatch.queue(
        routing.expert_index, logits.shape[-1], capacity, routing.priority
    ).kept


def test_batch_priority_keeps_the_most_confident_token():
    # All three tokens want expert 1 first, with gates 0.6, 0.8 and 0.7, and expert 2
    # next. Each has one slot: the first token gets both, or else the surest does.
    gates = jnp.array([[[0.1, 0.6, 0.3], [0.05, 0.8, 0.15], [0.1, 0.7, 0.2]]])
    first, second = [[True, True], [False, False]], [[False, False], [True, True]]
    np.testing.assert_array_equal(
        kept(jnp.log(gates), 1, batch_priority=False)[0, :2], first
    )
    np.testing.assert_array_equal(
        kept(jnp.log(gates), 1, batch_priority=True)[0, :2], second
    )


def test_batch_priority_does_not_matter_where_there_is_room():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 4))
    assert np.all(kept(logits, 6, batch_priority=True))


def test_gradients_by_finite_differences():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 4, 5))
    noise = jnp.float32(rng.normal(size=(1, 4, 5)))

    @jax.jit
    def loss(logits):
        routing = noisy_top_k(
            logits,
            noise,
            num_selected=2,
            importance_weight=1.0,
            load_weight=1.0,
            gshard_weight=1.0,
            z_weight=1.0,
        )
        return jnp.sum(jnp.square(routing.weight)) + routing.auxiliary_loss

    gradient = jax.jit(jax.grad(loss))(jnp.float32(logits))
    direction = rng.normal(size=logits.shape)
    step = 1e-3 * direction
    difference = loss(jnp.float32(logits + step)) - loss(jnp.float32(logits - step))
    slope = np.vdot(gradient, direction)
    np.testing.assert_allclose(slope, difference / 2e-3, rtol=2e-2)


def test_by_a_condition_it_is_the_router_of_switch_dit():
    """Softmax of Linear(SiLU(condition)), the best two not renormalised, no loss."""
    router = NoisyTopK(
        num_experts=3,
        num_selected=2,
        gate=ConditionGate,
        noise_std=0.0,
        importance_weight=0.0,
        load_weight=0.0,
    )
    rng = np.random.default_rng(2)
    kernel, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    # Two examples of three tokens each: all tokens of an example go the same way.
    timestep = rng.normal(size=(2, 4))
    condition = np.repeat(timestep, 3, axis=0)[None]
    variables = {"params": {"gate": {"kernel": kernel, "bias": bias}}}
    variables = jax.tree.map(jnp.float32, variables)
    routing = router.apply(
        variables, jnp.ones((1, 6, 5)), None, jnp.float32(condition), train=True
    )
    gates = softmax(timestep / (1 + np.exp(-timestep)) @ kernel + bias)
    best = np.argsort(-gates, axis=-1)[:, :2]
    weight = np.repeat(np.take_along_axis(gates, best, -1), 3, axis=0)
    np.testing.assert_array_equal(routing.expert_index[0], np.repeat(best, 3, axis=0))
    np.testing.assert_allclose(routing.weight[0], weight, rtol=1e-5)
    assert np.all(weight.sum(-1) < 0.99)
    assert routing.auxiliary_loss == 0.0


def test_with_a_condition_gate_the_condition_must_be_given():
    router = NoisyTopK(num_experts=3, num_selected=2, gate=ConditionGate)
    init = functools.partial(router.init, jax.random.key(0), jnp.ones((1, 2, 4)))
    with pytest.raises(ValueError, match="condition=None"):
        init(train=False)
