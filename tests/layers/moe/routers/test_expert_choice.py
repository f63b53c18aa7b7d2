import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe.routers import ExpertChoice
from mtl_jax.layers.moe.routers.expert_choice import expert_choice


def test_by_hand():
    # Expert 0 wants tokens 2 and 0, expert 1 tokens 1 and 3, by the softmax over
    # experts; of equal ones the first.
    gates = jnp.array([[[0.6, 0.4], [0.2, 0.8], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]])
    choice = expert_choice(jnp.log(gates), None, capacity=2)
    np.testing.assert_array_equal(choice.token_index, [[[2, 0], [1, 0]]])
    np.testing.assert_allclose(choice.weight, [[[0.9, 0.6], [0.8, 0.4]]], rtol=1e-6)
    np.testing.assert_array_equal(choice.processed, [[True, True, True, False, False]])
    np.testing.assert_allclose(choice.probabilities, gates, rtol=1e-6)
    tokens = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
    buffers = choice.dispatch(tokens)
    np.testing.assert_array_equal(buffers[..., 0], [[[3, 1]], [[2, 1]]])
    # Expert 0 returns 10 and 20, expert 1 returns 30 and 40.
    outputs = jnp.array([[[10.0, 20.0]], [[30.0, 40.0]]])[..., None]
    expected = [[0.6 * 20 + 0.4 * 40, 0.8 * 30, 0.9 * 10, 0, 0]]
    np.testing.assert_allclose(choice.combine(outputs)[..., 0], expected, rtol=1e-6)


def test_against_numpy():
    """Values, and gradients of a linear function of them."""
    groups, num_tokens, num_experts, capacity, width = 3, 11, 4, 5, 6
    rng = np.random.default_rng(0)
    logits, noise = rng.normal(size=(2, groups, num_tokens, num_experts))
    tokens, target = rng.normal(size=(2, groups, num_tokens, width))
    shift = 2.0 / num_experts * noise
    gates = np.exp(logits + shift)
    gates = gates / gates.sum(-1, keepdims=True)
    # Each expert multiplies by its number and one more.
    expected = np.zeros_like(tokens)
    by_token = np.zeros_like(tokens)
    for group in range(groups):
        for expert in range(num_experts):
            for token in np.argsort(-gates[group, :, expert])[:capacity]:
                factor = (expert + 1) * gates[group, token, expert]
                expected[group, token] += factor * tokens[group, token]
                by_token[group, token] += factor * target[group, token]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(tokens):
        choice = expert_choice(
            jnp.float32(logits), jnp.float32(noise), capacity=capacity, noise_std=2.0
        )
        numbers = jnp.arange(1.0, num_experts + 1).reshape(-1, 1, 1, 1)
        output = choice.combine(numbers * choice.dispatch(tokens))
        return jnp.sum(output * jnp.float32(target)), output

    (_, output), gradient = loss(jnp.float32(tokens))
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, by_token, rtol=1e-5, atol=1e-6)


def test_the_weights_have_a_gradient():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 6, 3))

    @jax.jit
    def loss(logits):
        weight = expert_choice(logits, None, capacity=2).weight
        return jnp.sum(weight * jnp.arange(1.0, 7.0).reshape(weight.shape))

    gradient = jax.grad(loss)(jnp.float32(logits))
    direction = rng.normal(size=logits.shape)
    step = 1e-2 * direction
    difference = loss(jnp.float32(logits + step)) - loss(jnp.float32(logits - step))
    np.testing.assert_allclose(np.vdot(gradient, direction), difference / 2e-2, 1e-2)


def choose(num_tokens=12, train=False, seed=None, **fields):
    router = ExpertChoice(**{"num_experts": 4, "num_selected": 2, **fields})
    tokens = jax.random.normal(jax.random.key(0), (2, num_tokens, 8))
    rngs = {"params": jax.random.key(1)}
    if seed is not None:
        rngs["router"] = jax.random.key(seed)
    init = jax.jit(functools.partial(router.init_with_output, train=train))
    return init(rngs, tokens)[0]


@pytest.mark.parametrize(
    ("num_tokens", "capacity_factor", "capacity"),
    [(12, 2.0, 6), (12, 1.0, 3), (10, 1.0, 3), (12, 9.0, 12), (12, 0.01, 1)],
)
def test_capacity(num_tokens, capacity_factor, capacity):
    choice = choose(num_tokens, capacity_factor=capacity_factor)
    assert choice.token_index.shape == (2, 4, capacity)
    # A token is not chosen twice by one expert.
    ordered = np.sort(choice.token_index, axis=-1)
    assert np.all(np.diff(ordered, axis=-1) > 0)


def test_experts_start_with_different_tokens():
    index = choose(capacity_factor=1.0).token_index
    assert len(np.unique(np.sort(index[0], axis=-1), axis=0)) > 1


def test_noise_is_drawn_in_training_alone():
    noisy = functools.partial(choose, noise_std=10.0)
    quiet = noisy().token_index
    np.testing.assert_array_equal(choose(train=True).token_index, quiet)
    assert not np.array_equal(noisy(train=True, seed=1).token_index, quiet)


@pytest.mark.parametrize(
    ("capacity_factor", "message"),
    [
        (0.0, r"capacity_factor=0\.0 gives each of 4.*with 0\.333333"),
        (-1.0, r"capacity_factor=-1\.0 gives each of 4"),
        (math.inf, r"=inf is not a finite number; make it positive\."),
        (math.nan, r"=nan is not a finite number; make it positive\."),
        (None, r"=None is not a finite number; make it positive\."),
    ],
)
def test_no_capacity_is_named(capacity_factor, message):
    with pytest.raises(ValueError, match=message):
        choose(capacity_factor=capacity_factor)
