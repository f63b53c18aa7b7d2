"""Rows exchanged as they are; the CPU has no such collective, so it is emulated."""

import functools

import jax
import jax.numpy as jnp
import pytest
from dense_oracle import DROPLESS, LIMITED, assert_equals_oracle, on_meshes

from mtl_jax.layers.mlp import Mlp, SwiGlu
from mtl_jax.layers.moe import grouped_matmul
from mtl_jax.layers.moe.execution import Execution

SHORT = {
    Execution("ragged_all_to_all", "sorted"): {
        ("1x8", 8, LIMITED, Mlp),
        ("2x4", 8, DROPLESS, SwiGlu),
    },
    Execution("ragged_all_to_all", "sorted", "ragged_dot"): {
        ("2x2x2", 2, LIMITED, Mlp),
    },
    Execution("ragged_all_to_all", "sorted", "megablox"): {("1x8", 8, DROPLESS, Mlp)},
}


def emulated(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """`jax.lax.ragged_all_to_all` by its definition, from gathered arrays."""
    del recv_sizes
    operands, begins, sizes, places = (
        jax.lax.all_gather(x, axis_name)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me, num_devices = jax.lax.axis_index(axis_name), len(begins)
    # Slices that each source has for this device.
    begins, sizes, places = (
        x.reshape(num_devices, num_devices, -1, 1)[:, me]
        for x in (begins, sizes, places)
    )
    offset = jnp.arange(len(operand)).reshape(1, 1, -1) - begins
    inside = (offset >= 0) & (offset < sizes)
    place = jnp.where(inside, places + offset, len(output))
    rows = jnp.broadcast_to(operands[:, None], (*place.shape, operand.shape[-1]))
    return output.at[place].set(rows, mode="drop")


@pytest.fixture(autouse=True)
def _emulation(monkeypatch):
    kernel = functools.partial(grouped_matmul.megablox, interpret=True)
    monkeypatch.setattr(grouped_matmul, "megablox", kernel)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)


@pytest.mark.parametrize(
    ("how", "mesh", "num_experts", "capacity", "kind", "routing"),
    on_meshes(SHORT),
)
def test_values_and_gradients_against_the_dense_oracle(
    how, mesh, num_experts, capacity, kind, routing
):
    assert_equals_oracle(how, mesh, num_experts, capacity, kind, routing)
