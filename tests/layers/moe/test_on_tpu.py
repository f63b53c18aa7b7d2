"""The layer compiled for TPU slices that are not there: collectives and products."""

import collections
import platform
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from mtl_jax.layers.moe import MoE
from mtl_jax.scaling import make_topology, prepare_environment
from mtl_jax.sharding import Rules, make_mesh, param_shardings, spec

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="libtpu is made for Linux on x86-64 alone",
)
BATCH, TOKENS, WIDTH, HIDDEN, EXPERTS, SELECTED = 16, 256, 512, 1024, 8, 2
IDEAL_FLOPS = 3 * 2 * 2 * BATCH * TOKENS * SELECTED * WIDTH * HIDDEN
"""Forward and backward, of all devices."""


@pytest.fixture(autouse=True)
def quick_compilation():
    prepare_environment()
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)


def compiled(capacity_factor, **sizes):
    """Forward and backward of one layer in bfloat16 on eight chips."""
    mesh = make_mesh(devices=make_topology("v5e:2x4").devices, **sizes)
    module = MoE(
        num_experts=EXPERTS,
        expert_hidden=HIDDEN,
        group_size=1,
        num_selected=SELECTED,
        capacity_factor=capacity_factor,
        dtype=jnp.bfloat16,
    )
    shape = (BATCH, TOKENS, WIDTH)
    boxed = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=False)
    )
    variables = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        nn.unbox(boxed),
        param_shardings(boxed, mesh, Rules()),
    )
    by_batch = NamedSharding(mesh, spec(Rules(), ("batch", None, None)))
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=by_batch)

    def loss(variables, x):
        y, sown = module.apply(
            variables,
            x,
            train=True,
            rngs={"router": jax.random.key(1)},
            mutable=["losses"],
        )
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + sown["losses"]["auxiliary"]

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return step.lower(variables, x).compile()


def collectives(program) -> dict[str, int]:
    found = re.findall(
        r" (ragged-all-to-all|all-to-all|all-gather|collective-permute)\(",
        program.as_text(),
    )
    return dict(collections.Counter(found))


def test_buffers_are_exchanged_and_nothing_else():
    program = compiled(1.25, expert=4)
    assert collectives(program) == {"all-to-all": 4}
    flops = program.cost_analysis()["flops"] * 8
    assert flops <= 1.10 * 1.25 * IDEAL_FLOPS


def test_rows_without_capacity_are_exchanged_as_they_are():
    # Plans are exchanged too, a few numbers each.
    found = collectives(compiled(None, expert=4))
    assert found["ragged-all-to-all"] == 4
    assert found.get("collective-permute", 0) == 0


def test_no_expert_multiplies_rows_of_others():
    program = compiled(None)
    assert collectives(program) == {}
    flops = program.cost_analysis()["flops"] * 8
    assert flops <= 1.10 * IDEAL_FLOPS
    # A product of every row with every kernel would have this axis.
    assert not re.search(
        rf"\[{EXPERTS},\d+,({WIDTH}|{HIDDEN})\]\S* dot", program.as_text()
    )
