"""The layer compiled for TPU slices that are not there: collectives and products."""

import base64
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
from visited import at_random, visited_rows

from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.grouped_matmul import row_tile
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


def flops_with_tiles(program, sizes, parts=1) -> float:
    """Operations, those of Megablox by the tiles that it visits.

    XLA has its kernels multiply the whole arrays that they are given, as these say.

    Args:
      program: Of rows that are multiplied by these kernels.
      sizes: Shapes of the layer.
      parts: Devices that share the experts.
    """
    kernels = re.findall(
        r"= \w+\[([\d,]*)\]\S* custom-call\([^\n]*tpu_custom_call", program.as_text()
    )
    shapes = [tuple(map(int, kernel.split(","))) for kernel in kernels]
    sides = {sizes.width, sizes.hidden}
    of_rows = [shape for shape in shapes if len(shape) == 2 and shape[1] in sides]
    of_kernels = [shape for shape in shapes if len(shape) == 3]
    # Up and down; of each the product, and the gradients of its rows and its kernel.
    assert (len(of_rows), len(of_kernels)) == (4, 2)
    (declared,) = {num_rows for num_rows, _ in of_rows}
    num_rows = sizes.batch * sizes.tokens * sizes.selected * parts // 8
    tile = row_tile(num_rows / parts, sizes.experts / parts)
    # As many groups of devices have all experts.
    visited = 8 // parts * visited_rows(at_random(num_rows, sizes.experts), tile)
    per_row = 6 * 2 * sizes.width * sizes.hidden
    return flops(program) + per_row * (visited - 8 * declared)


def assert_computes_what_it_must(total, sizes, capacity_factor=1.0, most=1.1):
    must = sizes.flops(capacity_factor)
    # XLA leaves out a few products of what is zero.
    assert 0.99 * must <= total <= most * must


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
    assert_computes_what_it_must(flops(program), SMALL, 1.25)


def test_rows_without_capacity_are_exchanged_as_they_are():
    program = compiled(None, expert=4)
    sent = travelling(program.as_text())
    assert {one.kind for one in sent} == {
        *("ragged-all-to-all", "all-to-all", "all-reduce")
    }
    rows = [one.bytes() for one in sent if one.kind == "ragged-all-to-all"]
    # A device sends what its 2 · 384 tokens chose twice, and has room for all that the
    # four of its group may send it.
    own = 2 * SMALL.tokens * SMALL.selected
    # Each of its two experts has them padded to tiles.
    room = (4 * own + 2 * 127) // 128 * 128
    travel = [2 * SMALL.width * rows for rows in (own, own, room, room)]
    assert sorted(rows) == travel
    # Plans are exchanged too, a few numbers each.
    assert all(one.bytes() <= 64 for one in sent if one.kind == "all-to-all")
    assert summed(sent, at_least=64) == gradients(experts=2)
    # The 768 rows of an expert take 6.5 tiles of 128 in the mean. What is done to each
    # number by itself is done to all that there is room for.
    total = flops_with_tiles(program, SMALL, 4)
    assert_computes_what_it_must(total, SMALL, most=1.15)


def test_no_expert_multiplies_rows_of_others():
    program = compiled(None)
    sent = travelling(program.as_text())
    assert {one.kind for one in sent} == {"all-reduce"}
    assert summed(sent, at_least=9) == gradients(experts=8)
    # The 192 rows of an expert take two tiles of 128, and fill three quarters.
    total = flops_with_tiles(program, SMALL)
    assert_computes_what_it_must(total, SMALL, most=1.37)
    assert not multiplies_rows_of_others(program, SMALL)


@pytest.mark.slow
def test_ragged_products_are_kernels_that_visit_as_many_tiles_as_there_are():
    program = compiled(None, expert=4, model=2)
    kernels = re.findall(r'%ragged-dot-none[^\n]*"body":"([^"]+)"', program.as_text())
    assert len(kernels) == 6
    for kernel in kernels:
        written = base64.b64decode(kernel).decode()
        (bounds,) = re.findall(r"iteration_bounds = array<i64: ([^>]*)>", written)
        # How many tiles of rows there are is known when it runs.
        assert bounds.split(", ").count(str(-(2**63))) == 1
        assert "window_bounds = array<i64: 128, 512>" in written
    # For XLA they are tiles of the whole array, of four times as many rows.
    assert flops(program) == pytest.approx(4 * SMALL.flops(), rel=0.05)


def test_a_program_that_multiplies_rows_of_others_is_told_from_one_that_does_not():
    program = compiled_module(Dense(SMALL), SMALL)
    assert multiplies_rows_of_others(program, SMALL)
    assert flops(program) >= 0.9 * SMALL.flops(SMALL.experts / SMALL.selected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capacity_factor", "images", "parts"),
    # Without a capacity, 128 images on a chip that has all experts, or 24 on one of
    # eight that share them. Fewer leave too much of an expert's last tile empty; and
    # activations are those of all rows that there is room for, eight times as many.
    [(1.25, 64, 8), (None, 1024, 1), (None, 192, 8)],
)
def test_vit_b16_with_32_experts_computes_little_more_than_it_must(
    capacity_factor, images, parts
):
    sizes = VIT_B16_MOE_32._replace(batch=images)
    program = compiled(capacity_factor, sizes, expert=parts)
    total = (
        flops(program) if capacity_factor else flops_with_tiles(program, sizes, parts)
    )
    assert_computes_what_it_must(total, sizes, capacity_factor or 1.0)
    assert not multiplies_rows_of_others(program, sizes)
