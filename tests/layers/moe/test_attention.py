"""Attention experts against a float64 loop over tokens, on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from mtl_jax.layers.moe import MoeAttention
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import ExpertChoice, NoisyTopK
from mtl_jax.sharding import Rules, make_mesh, param_shardings, spec

BATCH, TOKENS, WIDTH, EXPERTS, HEADS, HEAD_WIDTH = 8, 5, 6, 8, 3, 4
RULES = Rules()
SORTED = Execution("all_gather", "sorted")
EXCHANGED = Execution("all_to_all", "buffers")
LOCAL = [
    SORTED,
    Execution("all_gather", "buffers"),
    Execution("all_gather", "one_hot"),
]


def layer(**fields):
    defaults = {
        "num_experts": EXPERTS,
        "head_width": HEAD_WIDTH,
        "num_tasks": 2,
        "router": functools.partial(
            NoisyTopK,
            noise_std=0.0,
            gate=functools.partial(Gate, kernel_init=nn.initializers.normal(0.3)),
            importance_weight=1.0,
        ),
    }
    return MoeAttention(HEADS, **(defaults | fields))


def inputs():
    return jax.random.normal(jax.random.key(0), (BATCH, TOKENS, WIDTH))


def init(module):
    return module.init(jax.random.key(1), inputs(), 0, train=False)


@functools.cache
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.float32(0.5 * rng.normal(size=leaf.shape)),
        nn.unbox(jax.eval_shape(lambda: init(layer())))["params"],
    )


def oracle(params, x, task, capacity=TOKENS):
    """Each expert for each token that picked it and found room, one by one."""
    kernels = params["experts"]
    output = np.zeros(x.shape)
    kept = np.zeros((BATCH, TOKENS, HEADS), bool)
    for example, tokens in enumerate(x):
        logits = tokens @ params["router"]["gate"]["kernel"][task]
        gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        key, value = (
            tokens @ params[name]["kernel"] + params[name]["bias"]
            for name in ("key", "value")
        )
        taken = np.zeros(EXPERTS, int)
        picks = np.argsort(-gates, axis=-1)[:, :HEADS]
        for choice in range(HEADS):
            for token, expert in enumerate(picks[:, choice]):
                kept[example, token, choice] = taken[expert] < capacity
                taken[expert] += 1
                if not kept[example, token, choice]:
                    continue
                query = tokens[token] @ kernels["down"]["kernel"][expert]
                scores = np.exp(key @ query / np.sqrt(HEAD_WIDTH))
                attended = scores / scores.sum() @ value
                output[example, token] += (
                    gates[token, expert] * attended @ kernels["up"]["kernel"][expert]
                )
    return output, kept


def dense(params, x, task, kept):
    """The same with all experts on all tokens, to be differentiated."""
    gates = jax.nn.softmax(x @ params["router"]["gate"]["kernel"][task])
    _, picks = jax.lax.top_k(gates, HEADS)
    chosen = jnp.sum(
        jax.nn.one_hot(picks, EXPERTS, dtype=x.dtype)
        * jnp.asarray(kept, x.dtype)[..., None],
        axis=2,
    )
    key, value = (
        x @ params[name]["kernel"] + params[name]["bias"][None, None]
        for name in ("key", "value")
    )
    query = jnp.einsum("bsd,edh->bseh", x, params["experts"]["down"]["kernel"])
    scores = jnp.einsum("bseh,bth->bset", query, key) / np.sqrt(HEAD_WIDTH)
    attended = jnp.einsum("bset,bth->bseh", jax.nn.softmax(scores), value)
    return jnp.einsum(
        "bseh,ehd,bse->bsd",
        attended,
        params["experts"]["up"]["kernel"],
        gates * chosen,
    )


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@functools.cache
def expected(capacity):
    """Output of the loop, fraction dropped, and gradients in float64."""
    arguments, pulled = float64((params(), inputs())), float64(cotangent())
    output, kept = oracle(*arguments, 1, capacity)
    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, arguments)

        def loss(params, x):
            return jnp.sum(dense(params, x, 1, kept) * pulled)

        np.testing.assert_allclose(dense(*arguments, 1, kept), output, atol=1e-12)
        gradients = jax.device_get(jax.grad(loss, argnums=(0, 1))(*arguments))
    return output, 1 - kept.mean(), gradients


def cotangent():
    return jax.random.normal(jax.random.key(7), (BATCH, TOKENS, WIDTH))


def value_and_gradients(module, params, x):
    def loss(params, x):
        output, state = module.apply(
            {"params": params},
            x,
            jnp.int32(1),
            train=True,
            mutable=["losses", "statistics"],
        )
        return jnp.sum(output * cotangent()), (output, state)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def assert_as_expected(result, capacity=TOKENS):
    (_, (output, state)), gradients = result
    wanted, dropped, wanted_gradients = expected(capacity)
    np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        gradients,
        wanted_gradients,
    )
    np.testing.assert_allclose(state["statistics"]["dropped"], dropped, atol=1e-6)
    np.testing.assert_allclose(np.sum(state["statistics"]["load"]), 1, rtol=1e-5)
    assert state["losses"]["auxiliary"] > 0


def limited(module):
    # ceil(3 · 5 · 0.9 / 8) = 2 of 5 tokens.
    return module.clone(capacity_factor=0.9), 2


@pytest.mark.parametrize("how", LOCAL, ids="-".join)
def test_on_one_device(how):
    run = jax.jit(functools.partial(value_and_gradients, layer(execution=how)))
    assert_as_expected(run(params(), inputs()))


def test_experts_without_room_add_nothing():
    module, capacity = limited(layer())
    assert 0.05 < expected(capacity)[1] < 0.5
    run = jax.jit(functools.partial(value_and_gradients, module))
    assert_as_expected(run(params(), inputs()), capacity)


@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        (SORTED, {"data": 2, "expert": 4}),
        (EXCHANGED, {"expert": 8}),
        (SORTED, {"data": 8, "expert": 1}),
    ],
    ids=str,
)
def test_on_a_mesh(how, sizes):
    module, capacity = layer(execution=how), TOKENS
    if how is EXCHANGED:
        module, capacity = limited(module)
    mesh = make_mesh(**sizes)
    shapes = jax.eval_shape(lambda: init(module))["params"]
    shardings = param_shardings(shapes, mesh, RULES)
    batch = NamedSharding(mesh, spec(RULES, ("batch", None, None)))
    arguments = jax.device_put((params(), inputs()), (shardings, batch))
    with jax.set_mesh(mesh):
        result = jax.jit(functools.partial(value_and_gradients, module))(*arguments)
    assert_as_expected(result, capacity)
    gradients = result[1][0]
    for kernel in ("down", "up"):
        gradient = gradients["experts"][kernel]["kernel"]
        here = gradient.sharding.shard_shape(gradient.shape)
        assert here == (EXPERTS // sizes["expert"], *gradient.shape[1:])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_experts": 0}, "num_experts=0 leaves .* make it 1 or more"),
        (
            {"num_experts": 2},
            "num_heads=3 is not between 1 and num_experts=2, .* change num_heads, or",
        ),
        ({"head_width": None, "num_heads": 4}, "num_heads=4 does not divide the wid"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 gives experts no slot"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf .* or None for"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan is not a finite"),
    ],
)
def test_sizes_must_fit(fields, expected):
    with pytest.raises(ValueError, match=expected):
        init(layer().clone(**fields))


def test_a_single_example_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(5, 6\), .* a batch of 1"):
        layer().init(jax.random.key(1), inputs()[0], 0, train=False)


def test_a_router_that_fills_buffers_is_refused():
    module = MoeAttention(num_heads=2, num_experts=4, router=ExpertChoice)
    with pytest.raises(ValueError, match="router: attention needs one by which tokens"):
        jax.eval_shape(
            lambda: module.init(jax.random.key(0), jnp.zeros((2, 8, 16)), train=False)
        )
