"""No shipped config starts with experts that get no token, but Mod-Squad's.

Its gates start at zero, as released, and it has no noise either: see `ModSquad`.
"""

import functools

import jax
import numpy as np
import pytest

from mtl_jax import configuration
from mtl_jax.layers.moe.routing import Routing

# Of each config, variants that among them have all of its routers and gates.
VARIANTS = [
    *("m3vit:main", "m3vit:task_conditioned", "m3vit:single_gate"),
    *("earth_digits:main", "earth_digits:switch", "earth_digits:loss_free"),
    *("earth_digits:task_conditioned", "vision_moe:tiny_6m"),
]


def moe_of(name):
    """The layer, the number of tasks its router tells apart, and its width."""
    trunk = configuration.build(configuration.load_config(name).trunk)
    return trunk.moe(), trunk.num_tasks, trunk.width


def chosen(name):
    """Experts of 2,048 tokens at random, for each task, in training."""
    moe, num_tasks, width = moe_of(name)
    router = moe.router(
        num_experts=moe.num_experts, num_selected=moe.num_selected, num_tasks=num_tasks
    )
    tokens = jax.random.normal(jax.random.key(0), (1, 2048, width))
    route = jax.jit(functools.partial(router.init_with_output, train=True))
    for task in [None] if num_tasks is None else range(num_tasks):
        keys = {"params": jax.random.key(1), "router": jax.random.key(2)}
        routing, _ = route(keys, tokens, task)
        assert isinstance(routing, Routing)
        yield moe, set(np.asarray(routing.expert_index).flat)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_expert_gets_tokens_of_every_task(name):
    for moe, experts in chosen(name):
        assert experts == set(range(moe.num_experts))
