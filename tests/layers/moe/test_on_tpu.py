"""The layer compiled for TPU slices that are not there: collectives and products."""

import math
import platform
import re
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from travelling import summed, travelling, weights

from mtl_jax.layers.moe import MoE
from mtl_jax.scaling import make_topology, prepare_environment
from mtl_jax.sharding import Rules, make_mesh, param_shardings, spec

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="libtpu is made for Linux on x86-64 alone",
)


class Sizes(NamedTuple):
    """Shapes of one layer."""

    batch: int = 16
    # A device has 768 rows, so that no product of rows has the shape of a kernel.
    tokens: int = 384
    width: int = 512
    hidden: int = 1024
    experts: int = 8
    selected: int = 2

    def flops(self, capacity_factor: float = 1.0) -> float:
        """Of experts and gate, forward and backward, on all devices."""
        rows = self.batch * self.tokens
        experts = capacity_factor * self.selected * 2 * self.width * self.hidden
        return 3 * 2 * rows * (experts + self.width * self.experts)


SMALL = Sizes()
VIT_B16_MOE_32 = Sizes(64, 196, 768, 3072, 32)


@pytest.fixture(autouse=True)
def quick_compilation():
    prepare_environment()
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)


class Dense(nn.Module):
    """The layer by brute force: every row with every kernel, and others' masked."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x, *, train):
        del train
        width, hidden, experts, selected = self.sizes[2:]
        normal = nn.initializers.normal()
        up = self.param("up", normal, (experts, width, hidden)).astype(x.dtype)
        down = self.param("down", normal, (experts, hidden, width)).astype(x.dtype)
        gate = self.param("gate", normal, (width, experts))
        gates = jax.nn.softmax(x.astype(jnp.float32) @ gate)
        least = jax.lax.top_k(gates, selected)[0][..., -1:]
        weights = jnp.where(gates >= least, gates, 0).astype(x.dtype)
        rows = jax.nn.gelu(jnp.einsum("btd,edh->ebth", x, up))
        rows = jnp.einsum("ebth,ehd->ebtd", rows, down)
        zero = jnp.zeros(())
        self.sow("losses", "auxiliary", zero, jnp.add, init_fn=lambda: zero)
        return jnp.einsum("ebtd,bte->btd", rows, weights)


def compiled(capacity_factor, sizes=SMALL, **axes):
    """The layer's program in bfloat16 on eight chips."""
    module = MoE(
        num_experts=sizes.experts,
        expert_hidden=sizes.hidden,
        group_size=1,
        num_selected=sizes.selected,
        capacity_factor=capacity_factor,
        dtype=jnp.bfloat16,
    )
    return compiled_module(module, sizes, **axes)


def compiled_module(module, sizes, **axes):
    """Forward and backward on eight chips."""
    mesh = make_mesh(devices=make_topology("v5e:2x4").devices, **axes)
    shape = sizes.batch, sizes.tokens, sizes.width
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


def flops(program) -> float:
    return program.cost_analysis()["flops"] * 8


def multiplies_rows_of_others(program, sizes) -> bool:
    """Whether a product, on all devices, has every row with every kernel."""
    # The compiler for TPUs prints products as convolutions.
    shapes = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:dot|convolution)\(", program.as_text()
    )
    assert shapes, "the gate's product is in every program"
    made = {8 * math.prod(map(int, shape.split(","))) for shape in shapes if shape}
    rows = sizes.experts * sizes.batch * sizes.tokens
    return not made.isdisjoint({rows * sizes.width, rows * sizes.hidden})


def assert_computes_what_it_must(program, sizes, capacity_factor=1.0):
    assert flops(program) == pytest.approx(sizes.flops(capacity_factor), rel=0.1)


def gradients(experts):
    """Sizes of what is summed over devices that have so many of the experts."""
    return weights(experts, SMALL.width, SMALL.hidden, SMALL.experts)


def test_buffers_are_exchanged_and_nothing_else():
    program = compiled(1.25, expert=4)
    sent = travelling(program.as_text())
    assert {one.kind for one in sent} == {"all-to-all", "all-reduce"}
    # A device has 2 of 16 groups, and ceil(1.25 · 2 · 384 / 8) = 120 slots for each
    # expert and group, in bfloat16.
    exchanged = [one.bytes() for one in sent if one.kind == "all-to-all"]
    assert exchanged == [8 * 2 * 120 * SMALL.width * 2] * 4
    assert summed(sent, at_least=9) == gradients(experts=2)
    assert_computes_what_it_must(program, SMALL, 1.25)


def test_rows_without_capacity_are_exchanged_as_they_are():
    sent = travelling(compiled(None, expert=4).as_text())
    assert {one.kind for one in sent} == {
        *("ragged-all-to-all", "all-to-all", "all-reduce")
    }
    rows = [one.bytes() for one in sent if one.kind == "ragged-all-to-all"]
    # A device sends what its 2 · 384 tokens chose twice, and has room for all that the
    # four of its group may send it.
    own = 2 * SMALL.tokens * SMALL.selected * SMALL.width * 2
    assert sorted(rows) == [own, own, 4 * own, 4 * own]
    # Plans are exchanged too, a few numbers each.
    assert all(one.bytes() <= 64 for one in sent if one.kind == "all-to-all")
    assert summed(sent, at_least=64) == gradients(experts=2)


def test_no_expert_multiplies_rows_of_others():
    program = compiled(None)
    sent = travelling(program.as_text())
    assert {one.kind for one in sent} == {"all-reduce"}
    assert summed(sent, at_least=9) == gradients(experts=8)
    assert_computes_what_it_must(program, SMALL)
    assert not multiplies_rows_of_others(program, SMALL)


def test_a_program_that_multiplies_rows_of_others_is_told_from_one_that_does_not():
    program = compiled_module(Dense(SMALL), SMALL)
    assert multiplies_rows_of_others(program, SMALL)
    assert flops(program) >= 0.9 * SMALL.flops(SMALL.experts / SMALL.selected)


@pytest.mark.slow
@pytest.mark.parametrize("capacity_factor", [1.25, None])
def test_vit_b16_with_32_experts_computes_little_more_than_it_must(capacity_factor):
    sizes = VIT_B16_MOE_32
    axes = {"expert": 8} if capacity_factor else {}
    program = compiled(capacity_factor, sizes, **axes)
    assert_computes_what_it_must(program, sizes, capacity_factor or 1.0)
    assert not multiplies_rows_of_others(program, sizes)
