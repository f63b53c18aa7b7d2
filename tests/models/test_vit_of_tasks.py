"""Which layer is in which block, attention with routers, and vectors of tasks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.moe import MoE, MoeAttention
from mtl_jax.layers.moe.gates import ConditionGate
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.models import VisionTransformer
from mtl_jax.models.multitask import layer_statistics

IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
TRUNK = functools.partial(
    VisionTransformer, width=8, depth=3, num_heads=2, patch_size=4, mlp_ratio=2
)
EXPERTS = functools.partial(
    MoE, num_experts=4, num_selected=2, expert_hidden=8, group_size=1
)
HEADS = functools.partial(MoeAttention, num_experts=4)


def shapes(trunk, task=None):
    init = functools.partial(trunk.init, train=False)
    return nn.unbox(jax.eval_shape(init, jax.random.key(1), IMAGES, task))["params"]


def random(trunk, task=None):
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes(trunk, task)
    )


def layers(params):
    """Blocks with a mixture, and blocks whose heads are experts."""
    blocks = [params[f"block_{i}"] for i in range(3)]
    return (
        [i for i, block in enumerate(blocks) if "moe" in block],
        [i for i, block in enumerate(blocks) if "experts" in block["attention"]],
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ([], [])),
        ({"moe": EXPERTS}, ([1], [])),
        ({"moe": (EXPERTS,)}, ([0, 1, 2], [])),
        ({"moe": (None, None, EXPERTS)}, ([2], [])),
        ({"attention": HEADS}, ([], [0, 1, 2])),
        ({"attention": (HEADS, SelfAttention), "moe": EXPERTS}, ([1], [0, 2])),
    ],
)
def test_a_tuple_says_which_block_has_what(fields, expected):
    assert layers(shapes(TRUNK(**fields))) == expected


def test_blocks_may_have_different_numbers_of_experts():
    moe = (None, EXPERTS, functools.partial(EXPERTS, num_experts=3))
    params = shapes(TRUNK(moe=moe))
    kernels = (params[f"block_{i}"]["moe"]["experts"]["up"]["kernel"] for i in (1, 2))
    assert [kernel.shape[0] for kernel in kernels] == [4, 3]


def test_no_layers_is_an_error():
    with pytest.raises(ValueError, match=r"moe is \(\); give it a layer or None"):
        shapes(TRUNK(moe=()))


def test_attention_routes_for_the_task():
    trunk = TRUNK(attention=HEADS, num_tasks=3)
    params = random(trunk, jnp.int32(0))
    gate = params["block_0"]["attention"]["router"]["gate"]["kernel"]
    assert gate.shape == (3, 8, 4)

    @jax.jit
    def apply(params, task):
        return trunk.apply({"params": params}, IMAGES, task, mutable=["statistics"])

    first, sown = apply(params, jnp.int32(0))
    assert set(sown["statistics"]) == {"block_0", "block_1", "block_2"}
    np.testing.assert_allclose(
        jnp.sum(sown["statistics"]["block_0"]["attention"]["load"]), 1, rtol=1e-6
    )
    assert not np.allclose(first, apply(params, jnp.int32(1))[0])
    for i in range(3):
        router = params[f"block_{i}"]["attention"]["router"]["gate"]
        router["kernel"] = router["kernel"].at[1].set(router["kernel"][0])
    np.testing.assert_array_equal(first, apply(params, jnp.int32(1))[0])


def test_the_vector_of_the_task_is_added_before_every_block():
    """A block of zeros passes on what it gets: three blocks add three vectors."""
    trunk = TRUNK(num_tasks=2, task_embedding=True, final_norm=False)
    params = jax.tree.map(jnp.zeros_like, random(trunk, jnp.int32(0)))
    vectors = jnp.arange(16.0).reshape(2, 8)
    params["task_embedding"] = vectors
    features = [
        trunk.apply({"params": params}, IMAGES, jnp.int32(task)) for task in (0, 1)
    ]
    difference = np.broadcast_to(3 * (vectors[1] - vectors[0]), features[0].shape)
    np.testing.assert_allclose(features[1] - features[0], difference, rtol=1e-5)
    with pytest.raises(ValueError, match="set num_tasks to the number of tasks"):
        shapes(TRUNK(task_embedding=True))


BY_CONDITION = functools.partial(NoisyTopK, gate=ConditionGate, noise_std=0.0)


@pytest.mark.parametrize("fields", [{"remat": True}, {"scan": True}])
def test_every_layer_of_experts_routes_by_the_condition(fields):
    trunk = TRUNK(
        depth=2,
        moe=(functools.partial(EXPERTS, router=BY_CONDITION),),
        attention=functools.partial(HEADS, router=BY_CONDITION),
        **fields,
    )
    rng = np.random.default_rng(3)
    condition = rng.normal(size=(2, 5))
    init = functools.partial(trunk.init, train=False)
    made = nn.unbox(
        jax.eval_shape(init, jax.random.key(1), IMAGES, None, jnp.float32(condition))
    )
    params = jax.tree.map(
        lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), made["params"]
    )

    @jax.jit
    def apply(params, condition):
        _, sown = trunk.apply(
            {"params": params}, IMAGES, None, condition, mutable=["statistics"]
        )
        return layer_statistics(sown["statistics"], trunk.period)

    statistics = apply(params, jnp.float32(condition))
    silu = condition / (1 + np.exp(-condition))
    for i in range(2):
        for layer in ("moe", "attention"):
            block = params["blocks"]["block_0"] if trunk.scan else params[f"block_{i}"]
            gate = block[layer]["router"]["gate"]
            kernel, bias = (np.float64(gate[name]) for name in ("kernel", "bias"))
            if trunk.scan:
                kernel, bias = kernel[i], bias[i]
            logits = silu @ kernel + bias
            # All tokens of an example go to the two experts of largest logit.
            chosen = np.argsort(-logits, axis=-1)[:, :2]
            share = np.bincount(chosen.ravel(), minlength=4) / 4
            name = f"block_{i}" if layer == "moe" else f"block_{i}_attention"
            np.testing.assert_allclose(statistics[name]["load"], share, atol=1e-6)


def test_conditions_that_do_not_fit_are_errors():
    routed = functools.partial(HEADS, router=BY_CONDITION)

    def shape(trunk, *condition):
        jax.eval_shape(trunk.init, jax.random.key(1), IMAGES, None, *condition)

    with pytest.raises(ValueError, match=r"condition has shape \(2, 5\), but no block"):
        shape(TRUNK(), jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"shape \(3, 5\), but x has a batch of 2"):
        shape(TRUNK(attention=routed), jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="condition=None, but this gate routes by"):
        shape(TRUNK(attention=routed))
