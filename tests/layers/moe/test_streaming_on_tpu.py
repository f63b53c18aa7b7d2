"""Memory of programs for a TPU that is not there, with experts in the host's memory."""

import functools
import platform
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.streaming import HOST, PlacedExperts, streaming
from mtl_jax.scaling import make_topology, prepare_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="libtpu is made for Linux on x86-64 alone",
    ),
]

WIDTH, HIDDEN = 512, 2048
EXPERT = 4 * (2 * WIDTH * HIDDEN + WIDTH + HIDDEN)
"""Bytes of one expert: its kernels and biases in float32."""


def abstract(tree, sharding, number=None):
    """Shapes in one memory; with a number, of the first so many experts."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape if number is None else (number, *leaf.shape[1:]),
            leaf.dtype,
            sharding=sharding,
        ),
        tree,
    )


@functools.cache
def compiled(num_experts, *, streamed):
    """The layer's program on one v5e, with no expert resident or with all of them.

    Rows are few, so that memory is that of parameters.
    """
    prepare_environment()
    device = make_topology("v5e:2x2").devices[0]
    here, host = (SingleDeviceSharding(device, memory_kind=k) for k in ("device", HOST))
    layer = MoE(num_experts, HIDDEN, group_size=1, capacity_factor=None)
    x = jax.ShapeDtypeStruct((2, 64, WIDTH), jnp.float32, sharding=here)
    init = functools.partial(layer.init, train=False)
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0), x))["params"]
    arguments = abstract(params, here)
    if streamed:
        arguments["experts"] = PlacedExperts(
            abstract(params["experts"], here, 0),
            abstract(params["experts"], host),
            jax.ShapeDtypeStruct((num_experts,), jnp.int32, sharding=here),
        )

    @jax.jit
    def apply(params, x):
        with streaming():
            return layer.apply({"params": params}, x, train=False)

    if streamed:
        lowered = apply.trace(arguments, x).lower(lowering_platforms=("tpu",))
    else:
        # The plain layer chooses its kernels by the platform of the mesh.
        with jax.set_mesh(Mesh(np.array([device]), ("data",))):
            lowered = apply.lower(arguments, x)
    return lowered.compile()


def on_device(program):
    """Bytes of arguments and of what is computed, without the host's."""
    found = program.memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def on_host(program):
    found = program.memory_analysis()
    return found.host_argument_size_in_bytes + found.host_temp_size_in_bytes


def test_two_experts_at_most_are_on_the_device():
    plain, streamed = (compiled(16, streamed=streamed) for streamed in (False, True))
    assert on_device(plain) > 16 * EXPERT
    assert on_host(plain) == 0
    assert on_host(streamed) == pytest.approx(16 * EXPERT, rel=1e-3)
    # Activations included; less than one would mean that weights aren't counted.
    assert EXPERT < on_device(streamed) < 2 * EXPERT


def test_further_experts_take_no_memory_of_the_device():
    few, many = (compiled(number, streamed=True) for number in (16, 64))
    assert on_host(many) == pytest.approx(64 * EXPERT, rel=1e-3)
    assert abs(on_device(many) - on_device(few)) < EXPERT / 10


def test_the_next_expert_is_copied_while_one_computes():
    text = compiled(16, streamed=True).as_text()
    # In the body of the loop over experts is the loop over blocks of one's rows.
    bodies = [
        re.findall(r" (dynamic-slice-start|dynamic-slice-done|while)\(", computation)
        for computation in text.split("\n}\n")
        if "dynamic-slice-start(" in computation and "ENTRY" not in computation
    ]
    starts, dones = ["dynamic-slice-start"] * 4, ["dynamic-slice-done"] * 4
    assert bodies == [[*starts, "while", *dones]]
