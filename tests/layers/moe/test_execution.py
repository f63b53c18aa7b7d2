"""Every way to carry out a layer of experts computes the same as a dense oracle."""

import functools

import jax
import pytest
from dense_oracle import TOKENS, assert_close, expected, layer, problem
from jax.sharding import NamedSharding, PartitionSpec

from mtl_jax.layers.mlp import Mlp, SwiGlu
from mtl_jax.layers.moe import grouped, grouped_matmul
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.sharding import make_mesh

LOCAL = [
    Execution("all_gather", "buffers"),
    Execution("all_gather", "one_hot"),
    Execution("all_gather", "sorted"),
    Execution("all_gather", "sorted", "ragged_dot"),
    Execution("all_gather", "sorted", "megablox"),
]
ACROSS = [Execution("all_to_all", "buffers"), Execution("all_to_all", "one_hot")]
MESHES = [
    {"data": 1, "expert": 8},
    {"data": 2, "expert": 4},
    {"data": 8, "expert": 1},
    {"data": 1, "fsdp": 2, "expert": 2, "model": 2},
]
ROUTINGS = ["uneven", "empty", "one"]


def name(how: Execution) -> str:
    return "-".join(how)


@pytest.fixture(autouse=True)
def _emulated_kernel(monkeypatch):
    emulated = functools.partial(grouped_matmul.megablox, interpret=True)
    monkeypatch.setattr(grouped_matmul, "megablox", emulated)


@pytest.mark.parametrize("capacity", [6, TOKENS])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("how", LOCAL, ids=name)
def test_on_one_device(how, routing, capacity):
    *arguments, _ = problem(routing, 6, capacity)
    run = layer(how, Mlp, capacity, 1)
    assert_close(run(*arguments), expected(routing, 6, capacity))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("how", [LOCAL[0], LOCAL[2], *ACROSS], ids=name)
def test_on_a_mesh(how, routing, sizes):
    # As many experts as devices, more, and fewer, each on some mesh.
    num_experts = {8: 8, 4: 4, 1: 6, 2: 16}[sizes["expert"]]
    *arguments, _ = problem(routing, num_experts, 6)
    mesh = make_mesh(**sizes)
    by_group = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    by_expert = NamedSharding(mesh, PartitionSpec("expert"))
    arguments = jax.device_put(tuple(arguments), (by_expert, *(by_group,) * 3))
    with jax.set_mesh(mesh):
        result = layer(how, Mlp, 6, mesh)(*arguments)
    assert_close(result, expected(routing, num_experts, 6))


def test_emulated_kernels_on_a_mesh():
    # One mesh and routing: the emulation takes seconds to compile.
    how = Execution("all_gather", "sorted", "megablox")
    test_on_a_mesh(how, "uneven", {"data": 2, "expert": 4})


@pytest.mark.parametrize("how", LOCAL, ids=name)
def test_gated_experts(how):
    *arguments, _ = problem("uneven", 6, 6, SwiGlu)
    run = layer(how, SwiGlu, 6, 1)
    assert_close(run(*arguments), expected("uneven", 6, 6, SwiGlu))


@pytest.mark.parametrize("num_rows", [3, 100, 4096])
@pytest.mark.parametrize("num_experts", [1, 7, 32])
def test_a_block_for_an_even_share(num_rows, num_experts):
    sizes = grouped.block_sizes(num_rows, num_experts, num_rows)
    assert list(sizes) == sorted(set(sizes))
    few = grouped.block_sizes(num_rows, num_experts, most=7)
    assert few == (grouped.ROUNDING,)
    share = num_rows / num_experts
    fitting = min(size for size in sizes if size >= share)
    assert fitting <= share + grouped.ROUNDING
