"""Every way to carry out a layer of experts computes the same as a dense oracle."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
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
from mtl_jax.layers.moe import MoE, MoeAttention, grouped, grouped_matmul
from mtl_jax.layers.moe.execution import Execution, choose
from mtl_jax.sharding import expert_parallel, make_mesh

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


@pytest.mark.parametrize("devices", [1, 4])
def test_blocks_are_made_for_the_rows_of_one_devices_experts(devices, monkeypatch):
    made, block_sizes = [], grouped.block_sizes

    def recorded(*arguments):
        made.append(block_sizes(*arguments))
        return made[-1]

    monkeypatch.setattr(grouped, "block_sizes", recorded)
    mesh = make_mesh(expert=devices, devices=jax.devices()[:devices])
    layer = MoE(8, 4, 1, capacity_factor=None)
    x = jnp.ones((4, 256, 4))
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
    # 4 · 256 tokens go to two experts each, which gives each of eight 256 rows.
    assert made == [(128, 192, 224, 256, 288, 320, 384)]


def test_tiles_behind_the_last_row_are_not_multiplied():
    count = jnp.asarray([5, 0, 15], jnp.int32)
    rows = jnp.ones((64, 4)).at[20:].set(jnp.nan)
    kernel = jnp.arange(1.0, 4)[:, None, None] * jnp.ones((3, 4, 6))

    def product(rows, kernel):
        return grouped_matmul.megablox(rows, kernel, count, tile=16)[:20]

    result, pull_back = jax.vjp(product, rows, kernel)
    np.testing.assert_array_equal(result, [[4.0] * 6] * 5 + [[12.0] * 6] * 15)
    rows_gradient, kernel_gradient = pull_back(jnp.ones_like(result))
    np.testing.assert_array_equal(
        rows_gradient, [[6.0] * 4] * 5 + [[18.0] * 4] * 15 + [[0.0] * 4] * 44
    )
    np.testing.assert_array_equal(kernel_gradient[:, 0, 0], [5, 0, 15])
    np.testing.assert_array_equal(np.ptp(kernel_gradient, (1, 2)), 0)


@pytest.mark.parametrize(
    ("platform", "capacity_factor", "expected"),
    [
        ("gpu", 1.25, Execution("all_gather", "buffers")),
        ("gpu", None, Execution("all_gather", "sorted")),
        ("tpu", 1.25, Execution("all_gather", "buffers")),
        ("tpu", None, Execution("all_gather", "sorted", "megablox")),
        ("cpu", None, Execution("all_gather", "sorted")),
    ],
)
def test_no_platform_multiplies_rows_with_kernels_of_others(
    platform, capacity_factor, expected, monkeypatch
):
    monkeypatch.setattr(expert_parallel, "platform", lambda: platform)
    chosen = choose(
        num_assignments=4096,
        num_experts=8,
        num_selected=2,
        capacity_factor=capacity_factor,
        uses_matmuls=True,
        parameters={},
    )
    assert chosen == expected


@pytest.mark.parametrize(
    ("axes", "rows", "layout"),
    [
        ({"data": 1}, 128, "buffers"),
        ({"data": 1}, 1024, "sorted"),
        # Where examples are split each device has an eighth, or a quarter, of the rows;
        ({"data": 8}, 1024, "buffers"),
        ({"data": 2, "fsdp": 4}, 1024, "buffers"),
        ({"data": 2, "fsdp": 2, "expert": 2}, 512, "buffers"),
        ({"data": 2, "fsdp": 2, "expert": 2}, 1024, "sorted"),
        ({"data": 8}, 2048, "sorted"),
        # where experts are split, all rows of its experts.
        ({"expert": 2}, 1024, "sorted"),
        ({"expert": 2}, 128, "buffers"),
    ],
)
def test_what_counts_on_a_cpu_is_the_rows_of_an_expert_on_one_device(
    axes, rows, layout
):
    devices = jax.devices()[: math.prod(axes.values())]
    with jax.set_mesh(make_mesh(**axes, devices=devices)):
        chosen = choose(
            num_assignments=8 * rows,
            num_experts=8,
            num_selected=2,
            capacity_factor=1.25,
            uses_matmuls=True,
            parameters={},
        )
    assert chosen == Execution("all_gather", layout)


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        (Execution("ring", "buffers"), "execution.exchange is 'ring'; choose from"),  # type: ignore[arg-type]
        (Execution("all_gather", "buffer"), "execution.layout is 'buffer'; choose"),  # type: ignore[arg-type]
        (Execution("all_gather", "sorted", "x"), "execution.matmul is 'x'; choose"),  # type: ignore[arg-type]
        (
            Execution("all_to_all", "sorted"),
            "'sorted', but what 'all_to_all' exchanges is buffers or one_hot; choose",
        ),
        (
            Execution("ragged_all_to_all", "buffers"),
            "'buffers', but what 'ragged_all_to_all' exchanges is sorted; choose that",
        ),
        (
            Execution("all_gather", "buffers", "ragged_dot"),
            "'ragged_dot', which takes sorted rows and experts that have stages",
        ),
    ],
)
@pytest.mark.parametrize(
    "layer", [functools.partial(MoE, 8, 4, 1), functools.partial(MoeAttention, 2, 8)]
)
def test_a_way_that_there_is_not(layer, execution, message):
    layer = layer(execution=execution)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: layer.init(jax.random.key(0), jnp.ones((1, 6, 8)), train=False)
        )
