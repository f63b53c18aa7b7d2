"""The optimizer: what decays and how fast it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.train import adamw


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
