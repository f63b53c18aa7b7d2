"""Collectives in compiled programs, against bytes and groups by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mtl_jax.scaling.collectives import find_collectives
from mtl_jax.scaling.hlo import parse
from mtl_jax.sharding import make_mesh

MESH = {"data": 2, "fsdp": 1, "expert": 4, "model": 1}

TEXT = """
HloModule jit_step

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {{
  %x = bf16[8,16]{{1,0}} parameter(0)
{lines}
}}
"""


def find(lines, mesh=MESH):
    return find_collectives(parse(TEXT.format(lines=lines)), mesh)


# Device = 4 data + expert: groups of neighbours lie along expert, those 4 apart along
# data. 8·16 values of 2 bytes are 256.
@pytest.mark.parametrize(
    ("groups", "group", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3), ("expert",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4), ("data",)),
        ("{}", tuple(range(8)), ("data", "expert")),
        ("[2,4]<=[8]", (0, 1, 2, 3), ("expert",)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4), ("data",)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3), ("expert",)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4), ("data",)),
        ("mesh['a'=8] {'a'}", tuple(range(8)), ("data", "expert")),
        # The middle 2 of 8 = 2·2·2: devices 0 and 2.
        ("mesh['a'=8] {'a':(2)2}", (0, 2), ("expert",)),
        (
            "mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}",
            (0, 4),
            ("data",),
        ),
        (
            "mesh['a'=4,'b'=2], device_ids=([8]<=[2,4]T(1,0)) {'b'}",
            (0, 4),
            ("data",),
        ),
    ],
)
def test_groups_in_every_notation(groups, group, axes):
    (found,) = find(
        f"  ROOT %y = bf16[8,16]{{1,0}} all-reduce(%x), replica_groups={groups}, "
        "to_apply=%sum"
    )
    assert (found.group, found.axes) == (group, axes)
    assert (found.kind, found.bytes, found.times) == ("all-reduce", 256, 1)
    assert not found.overlapped


def test_the_larger_of_what_goes_in_and_comes_out_counts():
    gathers, scatters = find(
        "  %y = bf16[32,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[8]\n"
        "  ROOT %z = bf16[2,16]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8]"
    )
    assert (gathers.kind, gathers.bytes) == ("all-gather", 1024)
    assert (scatters.kind, scatters.bytes) == ("reduce-scatter", 256)


def test_what_is_begun_and_ended_apart_is_overlapped():
    (found,) = find(
        "  %s = (bf16[8,16]{1,0}, bf16[32,16]{1,0}, u32[]) all-gather-start(%x), "
        "replica_groups=[2,4]<=[8]\n"
        "  ROOT %d = bf16[32,16]{1,0} all-gather-done(%s)"
    )
    assert (found.kind, found.bytes, found.overlapped) == ("all-gather", 1024, True)


def test_groups_of_one_device_are_no_collectives():
    assert (
        find("  ROOT %y = bf16[8,16]{1,0} all-reduce(%x), replica_groups=[8,1]<=[8]")
        == []
    )


def test_a_permutation_spans_the_axes_of_its_cycle():
    (found,) = find(
        "  ROOT %y = bf16[8,16]{1,0} collective-permute(%x), "
        "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
    )
    assert found.group == (0, 1, 2, 3)
    assert found.axes == ("expert",)


# As XLA for TPU prints them, but for GROUPS and CHAIN, which keep the lines short.
CHAIN = """
HloModule jit_step

%begin (a: bf16[8,16]) -> bf16[32,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  ROOT %g.1 = bf16[32,16]{1,0} all-gather(%a), channel_id=3, GROUPS, CHAIN
}

%meanwhile (b: bf16[8,16]) -> bf16[32,16] {
  %b = bf16[8,16]{1,0} parameter(0)
  ROOT %g.2 = bf16[32,16]{1,0} all-gather(%b), channel_id=3, GROUPS, CHAIN
}

%scatter (c: bf16[8,16]) -> bf16[2,16] {
  %c = bf16[8,16]{1,0} parameter(0)
  %r = bf16[8,16]{1,0} all-reduce(%c), channel_id=4, GROUPS, to_apply=%sum
  %i = s32[] constant(0)
  ROOT %slice = bf16[2,16]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,16}
}

ENTRY %main (x: bf16[8,16]) -> bf16[2,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %async-collective-start = bf16[32,16]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %fusion = bf16[32,16]{1,0} fusion(%x), kind=kOutput, calls=%meanwhile
  ROOT %all-reduce-scatter = bf16[2,16]{1,0} fusion(%x), kind=kCustom, calls=%scatter
}
""".replace("GROUPS", "replica_groups=[2,4]<=[8]").replace(
    "CHAIN", 'frontend_attributes={chain_id="0"}'
)


def test_a_chain_of_fusions_is_one_gather_and_a_fused_reduction_a_scatter():
    gathers, scatters = find_collectives(parse(CHAIN), MESH)
    assert (gathers.kind, gathers.bytes, gathers.overlapped) == (
        "all-gather",
        1024,
        True,
    )
    assert (scatters.kind, scatters.bytes) == ("reduce-scatter", 256)
    assert not scatters.overlapped


@pytest.fixture
def mesh():
    return make_mesh(data=2, expert=4)


def test_a_program_that_is_compiled_here(mesh):
    """Three all-to-all over expert in a loop, and one sum over data."""
    shard = PartitionSpec(("data", "expert"))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=shard,
        out_specs=(shard, PartitionSpec("expert")),
    )
    def step(x):
        def send(_, x):
            return jnp.sin(jax.lax.all_to_all(x, "expert", 0, 0, tiled=True))

        return jax.lax.fori_loop(0, 3, send, x), jax.lax.psum(x, "data")

    x = jax.ShapeDtypeStruct(
        (8 * 4, 10), jnp.float32, sharding=NamedSharding(mesh, shard)
    )
    found = find_collectives(parse(step.lower(x).compile().as_text()), mesh.shape)
    summary = {(c.kind, c.axes): (c.times, c.bytes, len(c.group)) for c in found}
    # A device has 4 rows of 10 floats: 160 bytes.
    assert summary == {
        ("all-to-all", ("expert",)): (3, 160, 4),
        ("all-reduce", ("data",)): (1, 160, 2),
    }
