"""Compares the old tasks of a trunk of usual size with those of a grown one.

Heads and perceptrons are experts, of 8 then 12. Arguments: the name of a router, the
size of the batch, and ``scan`` for blocks in a loop. It fails where a bit differs.
"""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.heads import Classification
from mtl_jax.layers.moe import MoE, MoeAttention, routers
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.models import VisionTransformer
from mtl_jax.models.experts import extend
from mtl_jax.models.multitask import MultitaskModel, repeat


def trunk(router, scan, num_experts, *visible_experts):
    """A trunk of two tasks, or of as many as there are numbers of visible experts."""
    gate = functools.partial(Gate, visible_experts=visible_experts or None)
    shared = {
        "num_experts": num_experts,
        "capacity_factor": None,
        "router": functools.partial(router, gate=gate),
    }
    selected = 1 if router is routers.Switch else 2
    heads = functools.partial(MoeAttention, head_width=64, **shared)
    experts = functools.partial(
        MoE, expert_hidden=192, group_size=1, num_selected=selected, **shared
    )
    return VisionTransformer(
        width=96,
        depth=2,
        num_heads=selected,
        patch_size=4,
        moe=experts,
        attention=(heads, SelfAttention),
        num_tasks=len(visible_experts) or 2,
        task_embedding=True,
        scan=scan,
    )


def random_params(made, images, seed):
    """Random parameters of about the size that initial ones have."""
    init = functools.partial(made.init, train=False)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), images, 0)["params"])
    rng = np.random.default_rng(seed)

    def draw(leaf):
        inputs = leaf.shape[max(leaf.ndim - 2, 0)]
        return jnp.float32(rng.normal(size=leaf.shape) / inputs**0.5)

    return jax.tree.map(draw, shapes)


def main(name, batch, *rest):
    """Compares the features of both old tasks, in a loop over tasks and by itself."""
    make = functools.partial(trunk, getattr(routers, name), "scan" in rest)
    rng = np.random.default_rng(0)
    images = jnp.float32(rng.uniform(-1, 1, size=(int(batch), 28, 28, 3)))
    looped, alone, params = [], [], {}
    for seed, made in enumerate((make(8), make(12, 8, 8, 12))):
        params = extend(random_params(made, images, seed), params)
        names = tuple("abc"[: made.num_tasks])
        many = MultitaskModel(made, dict.fromkeys(names, Classification(3)))

        @jax.jit
        def features(params, images, many=many, names=names):
            copies = repeat(params, len(names))
            return many.apply_trunk(copies, images, names, train=False).features

        looped.append(features(params, images))
        apply = jax.jit(functools.partial(made.apply, train=False))
        alone.append(apply({"params": params}, images, jnp.int32(1)))
    assert np.abs(looped[0]).mean() > 1e-2
    np.testing.assert_array_equal(looped[1][:2], looped[0])
    np.testing.assert_array_equal(alone[1], alone[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
