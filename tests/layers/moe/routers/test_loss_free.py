import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import LossFree
from mtl_jax.layers.moe.routers.loss_free import loss_free, updated_bias


def logit(score):
    return jnp.log(jnp.asarray(score)) - jnp.log1p(-jnp.asarray(score))


SCORES = [[[0.6, 0.7, 0.3, 0.2]]]


@pytest.mark.parametrize(
    ("bias", "options", "index", "weight"),
    [
        ([0, 0, 0, 0], {}, [1, 0], [0.7 / 1.3, 0.6 / 1.3]),
        # The bias chooses expert 3, whose weight does not know of it.
        ([0, 0, 0, 0.45], {}, [1, 3], [0.7 / 0.9, 0.2 / 0.9]),
        ([0, 0, 0, 0.45], {"routed_scaling": 2.5}, [1, 3], [1.75 / 0.9, 0.5 / 0.9]),
        # SMoRA's code: biased scores 0.9 and 0.7, whose weights add up to 2.
        (
            [0.3, 0, 0, 0],
            {"routed_scaling": 2.0, "as_released": True},
            [0, 1],
            [1.125, 0.875],
        ),
    ],
)
def test_by_hand(bias, options, index, weight):
    routing = loss_free(
        logit(SCORES), jnp.array(bias, jnp.float32), num_selected=2, **options
    )
    np.testing.assert_array_equal(routing.expert_index, [[index]])
    np.testing.assert_allclose(routing.weight, [[weight]], rtol=1e-5)
    np.testing.assert_allclose(routing.probabilities, SCORES, rtol=1e-5)
    assert routing.auxiliary_loss == 0.0


def gradient_of_first_weight(low, **options):
    """One token for each of ``low``, by which all its logits are shifted."""

    def first(logits):
        weight = loss_free(logits, jnp.zeros(4), num_selected=2, **options).weight
        return jnp.sum(weight[..., 0]), weight

    logits = np.float32(low)[:, None] + np.float32([0, 1, -1, 2])
    gradient, weight = jax.jit(jax.grad(first, has_aux=True))(logits[None])
    return np.asarray(weight[0]), np.asarray(gradient[0])


def test_a_token_sure_of_no_expert_has_gradients():
    weight, gradient = gradient_of_first_weight([-20.0, -50.0, -80.0, -1e4])
    # Small sigmoids are exponentials, and the logits of those selected differ by one:
    # the larger weight is sigmoid(1), and its derivative that of sigmoid.
    larger, slope = 1 / (1 + np.exp(-1)), 1 / (2 + np.exp(-1) + np.exp(1))
    np.testing.assert_allclose(weight[:3], [[larger, 1 - larger]] * 3, rtol=1e-5)
    np.testing.assert_allclose(gradient[:3], [[0, -slope, 0, slope]] * 3, rtol=1e-5)
    # Sigmoids that are zero in float32 leave open which two are selected.
    np.testing.assert_allclose(np.sum(weight[3]), 1, rtol=1e-6)
    assert np.isfinite(gradient[3]).all()


def test_as_released_a_token_sure_of_no_expert_has_no_weight():
    weight, gradient = gradient_of_first_weight([-50.0, -80.0, -1e4], as_released=True)
    np.testing.assert_allclose(weight, np.zeros((3, 2)), atol=1e-18)
    np.testing.assert_allclose(gradient, np.zeros((3, 4)), atol=1e-18)


def test_an_expert_that_the_gate_hides_is_not_chosen_for_its_bias():
    logits = jnp.array([[[0.0, -1e30, 1.0, -1.0]]])
    routing = loss_free(logits, jnp.array([0.0, 9.0, 0.0, -2.0]), num_selected=3)
    np.testing.assert_array_equal(routing.expert_index, [[[2, 0, 3]]])


def test_bias_moves_against_the_count():
    # Counts 3, 0, 2, 1 around a mean of 1.5, in three groups.
    index = jnp.array([[[0, 2]], [[0, 3]], [[0, 2]]])
    all_seen = jnp.ones(4, bool)
    bias = updated_bias(jnp.array([0.1, 0.0, 0.0, -0.1]), index, all_seen, 0.01)
    np.testing.assert_allclose(bias, [0.09, 0.01, -0.01, -0.09], rtol=1e-6)
    even = updated_bias(jnp.ones(2), jnp.array([[[0, 1]]]), all_seen[:2], 0.01)
    np.testing.assert_array_equal(even, [1.0, 1.0])


def test_experts_that_a_task_does_not_see_are_not_in_its_mean():
    # Counts 3, 2, 1 of the three that are seen, around 2; over all five the mean would
    # be 1.2, and raise the bias of expert 1 rather than leave it.
    index = jnp.array([[[0, 1], [0, 1], [0, 2]]])
    seen = jnp.array([True, True, True, False, False])
    bias = updated_bias(jnp.array([0.0, 0.5, 0.0, 0.25, 0.0]), index, seen, 0.01)
    np.testing.assert_allclose(bias, [-0.01, 0.5, 0.01, 0.25, 0.0], rtol=1e-6)


def test_each_task_balances_the_experts_that_it_sees():
    gate = functools.partial(
        Gate, visible_experts=(3, 5), kernel_init=nn.initializers.zeros
    )
    router = LossFree(
        num_experts=5, num_selected=2, num_tasks=2, gate=gate, update_rate=0.01
    )
    variables, tokens = variables_and_tokens(router)

    @jax.jit
    def balance(task):
        _, updated = router.apply(
            variables, tokens, task, train=True, mutable=["balance"]
        )
        return updated["balance"]["bias"][task]

    # Equal logits send all tokens to experts 0 and 1.
    rate = np.float32(0.01)
    np.testing.assert_array_equal(balance(0), [-rate, -rate, rate, 0, 0])
    np.testing.assert_array_equal(balance(1), [-rate, -rate, rate, rate, rate])


def test_bias_has_no_gradient():
    def loss(bias, as_released):
        routing = loss_free(
            logit(SCORES), bias, num_selected=2, as_released=as_released
        )
        return jnp.sum(routing.weight**2)

    for as_released in (False, True):
        gradient = jax.grad(loss)(jnp.array([0.1, 0.0, 0.0, 0.0]), as_released)
        np.testing.assert_array_equal(gradient, np.zeros(4))


def test_bias_balances_what_logits_do_not():
    logits = np.random.default_rng(0).normal(size=(2, 256, 8)) + np.arange(8) / 4
    logits = jnp.float32(logits)
    route = functools.partial(loss_free, num_selected=2)

    def load(bias):
        index = route(logits, bias).expert_index
        return jnp.mean(jax.nn.one_hot(index, 8), axis=(0, 1, 2))

    def step(_, bias):
        index = route(logits, bias).expert_index
        return updated_bias(bias, index, jnp.ones(8, bool), 1e-3)

    balanced = jax.lax.fori_loop(0, 1000, step, jnp.zeros(8))
    assert np.max(load(jnp.zeros(8))) > 2 / 8
    np.testing.assert_allclose(load(balanced), np.full(8, 1 / 8), rtol=0.1)


def variables_and_tokens(router):
    tokens = jax.random.normal(jax.random.key(0), (2, 16, 8)) + 0.5
    task = None if router.num_tasks is None else 0
    return router.init(jax.random.key(1), tokens, task, train=True), tokens


def test_bias_moves_where_it_may():
    router = LossFree(num_experts=4, num_selected=2, update_rate=0.01)
    variables, tokens = variables_and_tokens(router)
    # Not by initialisation.
    np.testing.assert_array_equal(variables["balance"]["bias"], np.zeros(4))
    routing, updated = router.apply(variables, tokens, train=True, mutable=["balance"])
    all_seen = jnp.ones(4, bool)
    expected = updated_bias(jnp.zeros(4), routing.expert_index, all_seen, 0.01)
    assert np.any(expected)
    np.testing.assert_array_equal(updated["balance"]["bias"], expected)
    _, kept = router.apply(variables, tokens, train=False, mutable=["balance"])
    np.testing.assert_array_equal(kept["balance"]["bias"], np.zeros(4))
    frozen = router.apply(variables, tokens, train=True)
    np.testing.assert_array_equal(frozen.expert_index, routing.expert_index)
    with pytest.raises(ValueError, match="collection 'balance' is not among"):
        router.apply({"params": variables["params"]}, tokens, train=True)


def test_each_task_has_its_bias():
    router = LossFree(num_experts=4, num_selected=2, num_tasks=3)
    variables, tokens = variables_and_tokens(router)
    assert variables["balance"]["bias"].shape == (3, 4)

    @jax.jit
    def step(task):
        return router.apply(variables, tokens, task, train=True, mutable=["balance"])

    _, updated = step(jnp.int32(1))
    moved = np.any(np.asarray(updated["balance"]["bias"]) != 0, axis=1)
    np.testing.assert_array_equal(moved, [False, True, False])
    biased = {**variables, "balance": {"bias": jnp.eye(3, 4)}}
    for task in range(3):
        index = router.apply(biased, tokens, task, train=False).expert_index
        assert np.all(index[..., 0] == task)


@pytest.mark.parametrize(
    ("fields", "task", "message"),
    [
        ({"num_selected": 1}, None, r"num_selected=1.*select 2 or more"),
        ({"num_tasks": 2}, None, "task=None does not fit num_tasks=2"),
        ({"num_tasks": 2}, 2, "task=2 is not one of num_tasks=2"),
    ],
)
def test_bad_input_is_named(fields, task, message):
    router = LossFree(**{"num_experts": 4, "num_selected": 2, **fields})
    with pytest.raises(ValueError, match=message):
        router.init(jax.random.key(0), jnp.ones((1, 2, 3)), task, train=False)
