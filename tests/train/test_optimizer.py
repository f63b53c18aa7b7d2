"""The optimizer: what decays and how fast it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.train import adamw, sgd


def test_only_weights_decay():
    params = {
        "experts": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
        "norm": {"scale": jnp.ones(3)},
        "router": jnp.ones((3, 2)),
    }
    optimizer = adamw(num_steps=1, learning_rate=0.5, weight_decay=0.1)
    state = optimizer.init(params)
    zero = optax.tree.zeros_like(params)
    # The first step of the warm-up has a learning rate of zero.
    updates, state = optimizer.update(zero, state, params)
    updates, state = optimizer.update(zero, state, params)

    np.testing.assert_allclose(updates["experts"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["router"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["experts"]["bias"], 0)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)
    rate = optax.tree.get(
        state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )
    assert rate == np.float32(0.5)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("learning_rate", -1e-3, "at least 0"),
        ("warmup_fraction", 1.5, "at least 0 and at most 1"),
        ("b2", -0.1, "at least 0 and less than 1"),
        ("b2", 1.0, "at least 0 and less than 1"),
        ("max_norm", -1.0, "greater than 0, or None"),
        ("eps", float("nan"), "greater than 0"),
    ],
)
def test_numbers_out_of_range_are_refused(field, value, remedy):
    with pytest.raises(ValueError, match=f"optimizer.{field} is {value}; .*{remedy}$"):
        adamw(num_steps=10, **{field: value})


def test_sgd_decays_by_a_power_and_sends_weight_decay_through_the_momentum():
    optimizer = sgd(
        num_steps=4, learning_rate=0.1, momentum=0.9, weight_decay=0.01, power=0.9
    )
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.array([2.0])}
    state = optimizer.init(params)
    value, velocity = 2.0, 0.0
    for step in range(5):
        gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + 0.5 + 0.01 * value
        value -= 0.1 * (1 - min(step, 4) / 4) ** 0.9 * velocity
        for leaf in jax.tree.leaves(params):
            np.testing.assert_allclose(leaf, value, rtol=1e-6)


def test_sgd_clips_the_gradient_before_the_momentum():
    optimizer = sgd(num_steps=1, learning_rate=1.0, weight_decay=0.0, max_norm=1.0)
    params = jnp.zeros(2)
    updates, _ = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("learning_rate", -1e-3, "at least 0"),
        ("momentum", 1.0, "at least 0 and less than 1"),
        ("weight_decay", -1.0, "at least 0"),
        ("power", 0.0, "greater than 0"),
        ("max_norm", 0.0, "greater than 0, or None"),
    ],
)
def test_numbers_of_sgd_out_of_range_are_refused(field, value, remedy):
    with pytest.raises(ValueError, match=f"optimizer.{field} is {value}; .*{remedy}$"):
        sgd(num_steps=10, **{field: value})
