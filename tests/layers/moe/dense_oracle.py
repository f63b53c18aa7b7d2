"""A layer of experts as a product of every expert with every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mtl_jax.layers.mlp import Mlp
from mtl_jax.layers.moe import execution
from mtl_jax.layers.moe.routing import Routing

GROUPS, TOKENS, WIDTH, HIDDEN, SELECTED = 8, 24, 8, 12, 2


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
