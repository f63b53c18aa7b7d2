import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mtl_jax.layers.low_rank import LowRank
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.execution import Execution


def inputs():
    return jax.random.normal(jax.random.key(0), (2, 3, 6))


def test_against_numpy():
    module = LowRank(2, scale=3.0)
    params = nn.unbox(module.init(jax.random.key(1), inputs()))["params"]
    down, up = (np.float64(params[name]["kernel"]) for name in ("down", "up"))
    assert down.shape == (6, 2)
    actual = module.apply({"params": params}, inputs())
    np.testing.assert_allclose(
        actual, 3 * np.float64(inputs()) @ down @ up, rtol=1e-5, atol=1e-6
    )
    rank = np.linalg.matrix_rank(np.float64(actual).reshape(-1, 6), tol=1e-5)
    assert rank == 2


def test_nothing_at_first_as_in_lora():
    module = LowRank(2, up_init=nn.initializers.zeros)
    params = module.init(jax.random.key(1), inputs())
    np.testing.assert_array_equal(module.apply(params, inputs()), 0)


def test_as_experts():
    """The stages are the map: those of a mixture add up to a dense matrix a token."""
    module = MoE(
        num_experts=3,
        num_selected=2,
        expert_hidden=2,
        group_size=1,
        capacity_factor=None,
        expert=functools.partial(LowRank, scale=0.5),
        execution=Execution("all_gather", "sorted"),
    )
    x = inputs()
    init = functools.partial(module.init, train=False)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: jnp.float32(rng.normal(size=leaf.shape)),
        nn.unbox(jax.eval_shape(init, jax.random.key(0), x))["params"],
    )
    actual = jax.jit(functools.partial(module.apply, train=False))(
        {"params": params}, x
    )
    experts = params["experts"]
    matrices = 0.5 * np.float64(experts["down"]["kernel"]) @ experts["up"]["kernel"]
    logits = np.float64(x) @ params["router"]["gate"]["kernel"]
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for token in np.ndindex(2, 3):
        picked = np.argsort(-gates[token])[:2]
        matrix = np.tensordot(gates[token][picked], matrices[picked], 1)
        np.testing.assert_allclose(actual[token], x[token] @ matrix, rtol=1e-4)
