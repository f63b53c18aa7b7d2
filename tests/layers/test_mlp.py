import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mtl_jax.layers.mlp import Mlp, SwiGlu, exact_gelu, quick_gelu


def gelu(x):
    """Hendrycks & Gimpel's tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_against_numpy():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    boxed = Mlp(5).init(jax.random.key(1), x)
    key = jax.random.key(2)
    variables = jax.tree.map(lambda a: jax.random.normal(key, a.shape), nn.unbox(boxed))
    up, down = (
        jax.tree.map(np.float64, variables["params"][name]) for name in ("up", "down")
    )
    hidden = gelu(np.float64(x) @ up["kernel"] + up["bias"])
    expected = hidden @ down["kernel"] + down["bias"]
    np.testing.assert_allclose(Mlp(5).apply(variables, x), expected, rtol=1e-5)


POINTS = np.linspace(-4, 4, 33, dtype=np.float32)
FORMULAS = {
    exact_gelu: lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    quick_gelu: lambda x: x / (1 + math.exp(-1.702 * x)),
}


@pytest.mark.parametrize("activation", FORMULAS, ids=lambda f: f.__name__)
def test_activations_by_their_formulas(activation):
    expected = [FORMULAS[activation](float(x)) for x in POINTS]
    actual = activation(jnp.array(POINTS))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_perceptron_has_the_activation_that_it_is_given():
    eye = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    variables = {"params": {"up": eye, "down": eye}}
    x = jax.random.normal(jax.random.key(0), (3, 4))
    actual = Mlp(4, activation=jnp.square).apply(variables, x)
    np.testing.assert_allclose(actual, np.square(x), rtol=1e-6)


def test_a_gated_perceptron_against_numpy():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    # Two thirds of 20 are 13, and the next multiple of 8 is 16.
    params = nn.unbox(SwiGlu(20).init(jax.random.key(1), x))["params"]
    shapes = {name: layer["kernel"].shape for name, layer in params.items()}
    assert shapes == {"gate": (4, 16), "up": (4, 16), "down": (16, 4)}
    keys = iter(jax.random.split(jax.random.key(2), 6))
    params = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), params)
    layers = jax.tree.map(np.float64, params)

    def dense(name, x):
        return x @ layers[name]["kernel"] + layers[name]["bias"]

    gate, up = dense("gate", np.float64(x)), dense("up", np.float64(x))
    expected = dense("down", gate / (1 + np.exp(-gate)) * up)
    actual = SwiGlu(20).apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "inner"), [(Mlp, ("up",)), (SwiGlu, ("gate", "up"))])
def test_logical_axes_and_dtypes(make, inner):
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    module = make(5, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)["params"]
    for name in inner:
        assert params[name]["kernel"].names == ("embed", "mlp")
        assert params[name]["bias"].names == ("mlp",)
    assert params["down"]["kernel"].names == ("mlp", "embed")
    assert params["down"]["bias"].names == ("embed",)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert module.apply({"params": params}, x).dtype == jnp.bfloat16
