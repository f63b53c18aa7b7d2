"""A small model of three tasks, with experts in attention and behind it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.heads import Classification
from mtl_jax.layers.moe import MoE, MoeAttention
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.layers.moe.routers import LossFree
from mtl_jax.models import VisionTransformer
from mtl_jax.models.multitask import MultitaskModel, repeat

TASKS = ("first", "second", "third")
IMAGES = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3), minval=-1)
HIDDEN = 16
QUICK = Execution("all_gather", "buffers")
"""What compiles in least time."""


def model(
    tasks=TASKS,
    num_experts=4,
    router=LossFree,
    attention=SelfAttention,
    **fields,
):
    """Weights are renormalised and no token is dropped, unless told otherwise."""
    trunk = VisionTransformer(
        width=8,
        depth=2,
        num_heads=2,
        patch_size=4,
        mlp_ratio=HIDDEN / 8,
        moe=functools.partial(
            MoE,
            num_experts=num_experts,
            num_selected=2,
            expert_hidden=HIDDEN,
            group_size=1,
            capacity_factor=None,
            router=router,
            execution=QUICK,
        )
        if num_experts
        else None,
        attention=attention,
        num_tasks=len(tasks) if num_experts else None,
        **fields,
    )
    return MultitaskModel(trunk, {task: Classification(3) for task in tasks})


def heads_of_experts(num_experts=4):
    """Attention of two blocks, the first of which has heads that are experts."""
    heads = functools.partial(
        MoeAttention, num_experts=num_experts, router=LossFree, execution=QUICK
    )
    return heads, SelfAttention


def inputs(tasks=TASKS):
    return {task: jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32) for task in tasks}


def variables(model, seed=1):
    """Random parameters, and the collections as they begin."""

    def init():
        key, task = jax.random.key(0), 0 if model.task_conditioned else None
        trunk = model.trunk.init(key, IMAGES, task, train=False)
        features = jnp.zeros((1, 2, 2, 8))
        heads = {
            task: head.init(key, features)["params"]
            for task, head in model.heads.items()
        }
        return {"trunk": trunk["params"], "heads": heads}, {
            name: trunk[name] for name in trunk if name == "balance"
        }

    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.float32(0.5 * rng.normal(size=leaf.shape)),
        nn.unbox(jax.eval_shape(init)),
    )


def predict(model, params, task, collections=None, images=IMAGES):
    @jax.jit
    def compiled(params, collections):
        output = model.apply_trunk(
            repeat(params["trunk"], 1),
            images,
            (task,),
            train=False,
            collections=collections,
        )
        return model.apply_head(params["heads"][task], output.features[0], task)

    return compiled(params, collections or {})
