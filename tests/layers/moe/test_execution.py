"""Every way to carry out a layer of experts computes the same as a dense oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from mtl_jax.layers.mlp import Mlp, SwiGlu
from mtl_jax.layers.moe import execution, grouped, grouped_matmul
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.layers.moe.routing import Routing
from mtl_jax.sharding import make_mesh

GROUPS, TOKENS, WIDTH, HIDDEN, SELECTED = 8, 24, 8, 12, 2
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


def choices(routing: str, num_experts: int) -> np.ndarray:
    """Two different experts a token."""
    rng = np.random.default_rng(3)
    scores = rng.random((GROUPS, TOKENS, num_experts))
    if routing == "uneven":
        scores += np.arange(num_experts) ** 2 / num_experts
    if routing == "empty":
        scores[..., ::2] -= 2.0
    index = np.argsort(-scores, axis=-1)[..., :SELECTED]
    if routing == "one":
        # All first choices are the last expert.
        index = np.full_like(index, num_experts - 1)
        index[..., 1] = 0
    return index.astype(np.int32)


def problem(routing: str, num_experts: int, capacity: int, kind=Mlp):
    """Arguments of the layer, and what a loop over tokens keeps of them."""
    index = choices(routing, num_experts)
    kept = np.zeros(index.shape, np.float32)
    for group in range(GROUPS):
        taken = np.zeros(num_experts, int)
        for choice in range(SELECTED):
            for token in range(TOKENS):
                expert = index[group, token, choice]
                kept[group, token, choice] = taken[expert] < capacity
                taken[expert] += 1
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(
        kind(HIDDEN).init, jax.random.key(0), jnp.zeros((1, WIDTH))
    )["params"]
    parameters = jax.tree.map(
        lambda leaf: jnp.float32(0.4 * rng.normal(size=(num_experts, *leaf.shape))),
        nn.unbox(shapes),
    )
    groups = jnp.float32(rng.normal(size=(GROUPS, TOKENS, WIDTH)))
    weight = jnp.float32(rng.random(index.shape))
    return parameters, groups, weight, jnp.asarray(index), jnp.asarray(kept)


def oracle(kind, parameters, groups, weight, index, kept):
    """Every expert on every token."""
    outputs = jax.vmap(lambda p: kind(HIDDEN).apply({"params": p}, groups))(parameters)
    chosen = jax.nn.one_hot(index, outputs.shape[0])
    share = jnp.einsum("gsk,gske->gse", weight * kept, chosen)
    return jnp.einsum("gse,egsd->gsd", share, outputs)


@functools.cache
def layer(how, kind, capacity, mesh):
    """The compiled layer, its gradients, and what it dropped."""
    del mesh  # One program a mesh, whatever the routing.

    def run(parameters, groups, weight, index):
        routing = Routing(index, weight, weight, {}, jnp.float32(0))
        return execution.run(
            how, kind(HIDDEN).stages(), parameters, groups, routing, capacity
        )

    return gradients(run)


def gradients(function):
    cotangent = jax.random.normal(jax.random.key(7), (GROUPS, TOKENS, WIDTH))

    def loss(parameters, groups, weight, *rest):
        output, dropped = function(parameters, groups, weight, *rest)
        return jnp.sum(output * cotangent), (output, dropped)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def expected(routing, num_experts, capacity, kind=Mlp):
    *arguments, kept = problem(routing, num_experts, capacity, kind)

    def run(parameters, groups, weight, index):
        output = oracle(kind, parameters, groups, weight, index, kept)
        return output, 1 - jnp.mean(kept)

    return gradients(run)(*arguments)


def assert_close(actual, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        actual,
        wanted,
    )


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
