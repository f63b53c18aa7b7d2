import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe.routers import Soft
from mtl_jax.layers.moe.routers.soft import soft


def softmax(x, axis):
    x = np.exp(x)
    return x / x.sum(axis, keepdims=True)


def test_by_hand():
    # Cosines are 1 where token and slot have the same direction, and 0 otherwise; the
    # scale makes weights of 3 and 1 of them. Slots are experts 0 and 1, and token 2 has
    # the direction of token 1.
    tokens = jnp.array([[[5.0, 0.0], [0.0, 7.0], [0.0, 9.0]]])
    slots = jnp.array([[2.0, 0.0], [0.0, 0.5]])[..., None]
    weights = soft(tokens, slots, jnp.float32(math.log(3)))
    np.testing.assert_allclose(
        weights.dispatch_weight[0, :, :, 0],
        [[3 / 5, 1 / 7], [1 / 5, 3 / 7], [1 / 5, 3 / 7]],
        rtol=1e-5,
    )
    combine = [[3 / 4, 1 / 4], [1 / 4, 3 / 4], [1 / 4, 3 / 4]]
    np.testing.assert_allclose(weights.combine_weight[0, :, :, 0], combine, rtol=1e-5)
    np.testing.assert_allclose(weights.probabilities[0], combine, rtol=1e-5)
    assert np.all(weights.processed)
    np.testing.assert_allclose(
        weights.dispatch(tokens)[:, 0, 0],
        [[3.0, 16 / 5], [5 / 7, 48 / 7]],
        rtol=1e-5,
    )
    outputs = jnp.array([4.0, 8.0]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(weights.combine(outputs)[0, :, 0], [5, 7, 7], rtol=1e-5)


def test_against_numpy():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 7, 5))
    slots = rng.normal(size=(5, 3, 2))
    outputs = rng.normal(size=(3, 2, 2, 4))
    unit = tokens / np.sqrt((tokens**2).sum(-1, keepdims=True) + 1e-6)
    directions = slots / np.sqrt((slots**2).sum(0, keepdims=True) + 1e-6)
    logits = 1.7 * np.einsum("gsd,dep->gsep", unit, directions)
    weights = jax.jit(soft)(jnp.float32(tokens), jnp.float32(slots), jnp.float32(1.7))
    np.testing.assert_allclose(
        weights.dispatch(jnp.float32(tokens)),
        np.einsum("gsep,gsd->egpd", softmax(logits, 1), tokens),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        weights.combine(jnp.float32(outputs)),
        np.einsum("gsep,egpd->gsd", softmax(logits, (2, 3)), outputs),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_zero_token_gives_no_nan():
    def loss(tokens):
        weights = soft(tokens, jnp.ones((3, 2, 1)), jnp.float32(1.0))
        return jnp.sum(weights.dispatch(tokens) ** 2)

    gradient = jax.jit(jax.grad(loss))(jnp.zeros((1, 2, 3)).at[0, 0].set(1.0))
    assert np.all(np.isfinite(gradient))


def init(num_tokens, task=None, **fields):
    router = Soft(**{"num_experts": 4, "num_selected": 2, **fields})
    tokens = jnp.ones((1, num_tokens, 6))
    step = functools.partial(router.init_with_output, train=True)
    weights, variables = jax.jit(step)(jax.random.key(0), tokens, task)
    return weights, variables["params"]


@pytest.mark.parametrize(
    ("num_tokens", "capacity_factor", "num_slots"),
    [(12, 1.0, 3), (12, 2.0, 6), (9, 1.0, 2), (11, 1.0, 3), (3, 1.0, 1)],
)
def test_slots(num_tokens, capacity_factor, num_slots):
    weights, params = init(num_tokens, capacity_factor=capacity_factor)
    assert params["slots"].value.shape == (6, 4, num_slots)
    assert weights.dispatch_weight.shape == (1, num_tokens, 4, num_slots)


def test_each_task_has_its_slots():
    weights, params = init(8, jnp.int32(1), num_tasks=3)
    slots, scale = params["slots"], params["scale"]
    assert slots.names == ("task", "embed", "expert_logits", None)
    assert slots.value.shape == (3, 6, 4, 2)
    assert scale.names == ("task",)
    np.testing.assert_array_equal(scale.value, np.ones(3))
    expected = soft(jnp.ones((1, 8, 6)), slots.value[1], jnp.float32(1.0))
    np.testing.assert_allclose(
        weights.combine_weight, expected.combine_weight, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("num_tokens", "fields", "message"),
    [
        (1, {}, r"capacity_factor=1\.0 gives each of 4 experts no slot for 1 tokens"),
        (8, {"capacity_factor": 0.1}, r"capacity_factor=0\.1 .* with 0\.5 each has"),
        (8, {"capacity_factor": -1.0}, r"capacity_factor=-1\.0 gives each of 4"),
        (8, {"capacity_factor": math.inf}, "=inf is not a finite number; make it pos"),
        (8, {"capacity_factor": math.nan}, "=nan is not a finite number; make it pos"),
        (8, {"capacity_factor": None}, r"=None is not a finite number; .*positive\."),
        (8, {"num_tasks": 2}, "task=None does not fit num_tasks=2"),
    ],
)
def test_bad_input_is_named(num_tokens, fields, message):
    with pytest.raises(ValueError, match=message):
        init(num_tokens, **fields)
