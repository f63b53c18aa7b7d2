import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mtl_jax.layers.attention import SelfAttention


def attend(params, x):
    """One example, head and query at a time, in float64."""
    params = jax.tree.map(np.float64, params)
    output = np.zeros(x.shape)
    query, key, value = (
        np.einsum("bnd,dhk->bhnk", x, params[name]["kernel"])
        + params[name]["bias"][:, None]
        for name in ("query", "key", "value")
    )
    for batch, head, token in np.ndindex(query.shape[:3]):
        scores = key[batch, head] @ query[batch, head, token]
        scores = np.exp(scores / np.sqrt(query.shape[-1]))
        mixed = scores @ value[batch, head] / scores.sum()
        output[batch, token] += mixed @ params["output"]["kernel"][head]
    return output + params["output"]["bias"]


@pytest.mark.parametrize("module", [SelfAttention(3), SelfAttention(4, head_width=5)])
def test_against_numpy(module):
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    variables = nn.unbox(module.init(jax.random.key(1), x))
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    variables = structure.unflatten(
        0.7 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    )
    actual = module.apply(variables, x)
    expected = attend(variables["params"], np.float64(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_logical_axes_and_dtypes():
    x = jnp.ones((2, 5, 6), jnp.bfloat16)
    module = SelfAttention(3, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)["params"]
    for name in ("query", "key", "value"):
        assert params[name]["kernel"].names == ("embed", "heads", "kv")
        assert params[name]["bias"].names == ("heads", "kv")
    assert params["output"]["kernel"].names == ("heads", "kv", "embed")
    assert params["output"]["bias"].names == ("embed",)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert module.apply({"params": params}, x).dtype == jnp.bfloat16


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=4 does not divide the width 6"):
        SelfAttention(4).init(jax.random.key(0), jnp.ones((1, 2, 6)))


@pytest.mark.parametrize(
    ("field", "without"),
    [("qkv_bias", {"query", "key", "value"}), ("output_bias", {"output"})],
)
def test_a_projection_without_bias_is_one_with_bias_zero(field, without):
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    module = SelfAttention(3, **{field: False})
    params = nn.unbox(module.init(jax.random.key(1), x))["params"]
    assert {name for name, layer in params.items() if "bias" not in layer} == without
    zeros = nn.unbox(SelfAttention(3).init(jax.random.key(1), x))["params"]
    filled = {name: {**zeros[name], **layer} for name, layer in params.items()}
    np.testing.assert_allclose(
        module.apply({"params": params}, x),
        attend(filled, np.float64(x)),
        rtol=1e-5,
        atol=1e-5,
    )
