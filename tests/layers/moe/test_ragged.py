"""Rows exchanged as they are; the CPU has no such collective, so it is emulated."""

import jax
import jax.numpy as jnp
import pytest
from dense_oracle import assert_close, expected, layer, problem
from jax.sharding import NamedSharding, PartitionSpec

from mtl_jax.layers.mlp import Mlp
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.sharding import make_mesh

HOW = Execution("ragged_all_to_all", "sorted")


def emulated(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """`jax.lax.ragged_all_to_all` by its definition, from gathered arrays."""
    del recv_sizes
    operands, begins, sizes, places = (
        jax.lax.all_gather(x, axis_name)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me = jax.lax.axis_index(axis_name)
    num_devices, num_slices = begins.shape
    mine = num_slices // num_devices
    row = jnp.arange(operand.shape[0])
    for source in range(num_devices):
        for i in range(mine):
            slice_ = me * mine + i
            offset = row - begins[source, slice_]
            inside = (offset >= 0) & (offset < sizes[source, slice_])
            place = jnp.where(inside, places[source, slice_] + offset, len(output))
            output = output.at[place].set(operands[source], mode="drop")
    return output


@pytest.fixture(autouse=True)
def _emulation(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)


@pytest.mark.parametrize("capacity", [6, 24])
@pytest.mark.parametrize("routing", ["uneven", "empty", "one"])
@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"expert": 8}], ids=str)
def test_values_and_gradients_against_the_dense_oracle(sizes, routing, capacity):
    *arguments, _ = problem(routing, 8, capacity)
    mesh = make_mesh(**sizes)
    by_group = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    by_expert = NamedSharding(mesh, PartitionSpec("expert"))
    arguments = jax.device_put(tuple(arguments), (by_expert, *(by_group,) * 3))
    with jax.set_mesh(mesh):
        result = layer(HOW, Mlp, capacity, mesh)(*arguments)
    assert_close(result, expected(routing, 8, capacity))
