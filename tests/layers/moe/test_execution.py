"""Every way to carry out a layer of experts computes the same as a dense oracle."""

import functools

import pytest
from dense_oracle import (
    DROPLESS,
    LIMITED,
    ROUTINGS,
    assert_close,
    assert_equals_oracle,
    expected,
    layer,
    name,
    on_meshes,
    problem,
)

from mtl_jax.layers.mlp import Mlp, SwiGlu
from mtl_jax.layers.moe import grouped, grouped_matmul
from mtl_jax.layers.moe.execution import Execution

LOCAL = [
    Execution("all_gather", "buffers"),
    Execution("all_gather", "one_hot"),
    Execution("all_gather", "sorted"),
    Execution("all_gather", "sorted", "ragged_dot"),
    Execution("all_gather", "sorted", "megablox"),
]
SHORT = {
    LOCAL[0]: {
        ("1x8", 8, DROPLESS, Mlp),
        ("8x1", 16, LIMITED, SwiGlu),
        ("2x2x2", 16, LIMITED, Mlp),
    },
    LOCAL[1]: {("1x8", 16, LIMITED, SwiGlu), ("2x4", 4, DROPLESS, Mlp)},
    LOCAL[2]: {
        ("1x8", 8, LIMITED, Mlp),
        ("2x4", 8, DROPLESS, SwiGlu),
        ("2x2x2", 2, LIMITED, Mlp),
    },
    LOCAL[3]: {("1x8", 16, DROPLESS, SwiGlu), ("8x1", 6, LIMITED, Mlp)},
    LOCAL[4]: {("2x4", 8, DROPLESS, SwiGlu)},
    Execution("all_to_all", "buffers"): {
        ("1x8", 16, LIMITED, Mlp),
        ("2x4", 8, LIMITED, SwiGlu),
        ("2x2x2", 2, DROPLESS, Mlp),
    },
    Execution("all_to_all", "one_hot"): {
        ("1x8", 8, DROPLESS, Mlp),
        ("2x4", 8, LIMITED, SwiGlu),
    },
}


@pytest.fixture(autouse=True)
def _emulated_kernel(monkeypatch):
    emulated = functools.partial(grouped_matmul.megablox, interpret=True)
    monkeypatch.setattr(grouped_matmul, "megablox", emulated)


@pytest.mark.parametrize("capacity", [LIMITED, DROPLESS])
@pytest.mark.parametrize(
    "routing", [*ROUTINGS[:3], pytest.param("only", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("how", LOCAL, ids=name)
def test_on_one_device(how, routing, capacity):
    *arguments, _ = problem(routing, 6, capacity)
    run = layer(how, Mlp, capacity, 1)
    assert_close(run(*arguments), expected(routing, 6, capacity))


@pytest.mark.parametrize(
    ("how", "mesh", "num_experts", "capacity", "kind", "routing"),
    on_meshes(SHORT),
)
def test_on_a_mesh(how, mesh, num_experts, capacity, kind, routing):
    assert_equals_oracle(how, mesh, num_experts, capacity, kind, routing)


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
