import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mtl_jax.layers.mlp import Mlp


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


def test_logical_axes_and_dtypes():
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    module = Mlp(5, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)["params"]
    assert params["up"]["kernel"].names == ("embed", "mlp")
    assert params["up"]["bias"].names == ("mlp",)
    assert params["down"]["kernel"].names == ("mlp", "embed")
    assert params["down"]["bias"].names == ("embed",)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert module.apply({"params": params}, x).dtype == jnp.bfloat16
