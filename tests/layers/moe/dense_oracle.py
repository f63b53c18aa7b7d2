"""A layer of experts as a product of every expert with every token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from mtl_jax.layers.low_rank import LowRank
from mtl_jax.layers.mlp import Mlp, SwiGlu
from mtl_jax.layers.moe import execution
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.layers.moe.routing import Routing
from mtl_jax.sharding import make_mesh

GROUPS, TOKENS, WIDTH, HIDDEN = 8, 24, 8, 12
ROUTINGS = ["uneven", "empty", "one", "only"]
LIMITED, DROPLESS = 6, TOKENS
MESHES = {
    "1x8": {"data": 1, "expert": 8},
    "2x4": {"data": 2, "expert": 4},
    "8x1": {"data": 8, "expert": 1},
    "2x2x2": {"data": 1, "fsdp": 2, "expert": 2, "model": 2},
}
# Fewer than devices, as many, and more, as far as the mesh can split them.
NUM_EXPERTS = {"1x8": (8, 16), "2x4": (4, 8), "8x1": (6, 16), "2x2x2": (2, 16)}


def name(how: Execution) -> str:
    return "-".join(how)


def on_meshes(short):
    """All combinations for these ways, of which those in ``short`` aren't slow.

    Gated experts, those of low rank, which have no bias, and a single choice are met by
    all but each number of experts.

    Args:
      short: For each way ``(mesh, experts, capacity, kind)``, chosen so that it meets
        each of them.
    """
    cases = []
    for how, mesh, capacity in itertools.product(short, MESHES, (LIMITED, DROPLESS)):
        few, many = NUM_EXPERTS[mesh]
        # Routings of as many choices share a program.
        for number, kind, routings in (
            (few, Mlp, ROUTINGS),
            (many, Mlp, ROUTINGS[:3]),
            (many, SwiGlu, ROUTINGS[:3]),
            (few, LowRank, ROUTINGS[1:2]),
        ):
            fields = mesh, number, capacity, kind
            limit = "dropless" if capacity == DROPLESS else "limited"
            words = name(how), mesh, str(number), limit, kind.__name__
            for routing in routings:
                # All rows are on one device of eight there.
                quick = fields in short[how] and (routing != "only" or mesh == "1x8")
                case = pytest.param(
                    how,
                    *fields,
                    routing,
                    marks=() if quick else pytest.mark.slow,
                    id="-".join((*words, routing)),
                )
                cases.append(case)
    return cases


def choices(routing: str, num_experts: int) -> np.ndarray:
    """Two different experts a token; for ``"only"`` one, the same for all tokens."""
    rng = np.random.default_rng(3)
    scores = rng.random((GROUPS, TOKENS, num_experts))
    if routing == "uneven":
        scores += np.arange(num_experts) ** 2 / num_experts
    if routing == "empty":
        scores[..., ::2] -= 2.0
    index = np.argsort(-scores, axis=-1)[..., :2]
    if routing in {"one", "only"}:
        # All first choices are the last expert.
        index = np.full_like(index, num_experts - 1)
        index[..., 1] = 0
    return index[..., : 1 if routing == "only" else 2].astype(np.int32)


def problem(routing: str, num_experts: int, capacity: int, kind=Mlp):
    """Arguments of the layer, and what a loop over tokens keeps of them."""
    index = choices(routing, num_experts)
    kept = np.zeros(index.shape, np.float32)
    for group in range(GROUPS):
        taken = np.zeros(num_experts, int)
        for choice in range(index.shape[-1]):
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


@functools.lru_cache(maxsize=8)
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
def dense(kind):
    """The compiled oracle, its gradients, and what was dropped."""

    def run(parameters, groups, weight, index, kept):
        output = oracle(kind, parameters, groups, weight, index, kept)
        return output, 1 - jnp.mean(kept)

    return gradients(run)


@functools.cache
def expected(routing, num_experts, capacity, kind=Mlp):
    return dense(kind)(*problem(routing, num_experts, capacity, kind))


def assert_close(actual, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        actual,
        wanted,
    )


def assert_equals_oracle(how, mesh, num_experts, capacity, kind, routing):
    """Values and gradients of inputs, gates and weights, on a mesh of `MESHES`."""
    *arguments, _ = problem(routing, num_experts, capacity, kind)
    mesh = make_mesh(**MESHES[mesh])
    by_group = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    by_expert = NamedSharding(mesh, PartitionSpec("expert"))
    arguments = jax.device_put(tuple(arguments), (by_expert, *(by_group,) * 3))
    with jax.set_mesh(mesh):
        result = layer(how, kind, capacity, mesh)(*arguments)
    assert_close(result, expected(routing, num_experts, capacity, kind))
