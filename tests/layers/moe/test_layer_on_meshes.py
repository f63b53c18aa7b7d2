"""The layer computes the same on any mesh, and moves tokens by all-to-all alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from travelling import summed, travelling, weights

from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.sharding import Rules, make_mesh, param_shardings, spec

WIDTH, TOKENS, BATCH = 16, 8, 16
MODULE = MoE(
    num_experts=8,
    expert_hidden=12,
    group_size=2,
    capacity_factor=0.8,
    num_tasks=3,
    router=functools.partial(
        NoisyTopK,
        gate=functools.partial(Gate, kernel_init=nn.initializers.normal(0.3)),
        importance_weight=1.0,
        load_weight=1.0,
    ),
)
RULES = Rules()


def inputs():
    return jax.random.normal(jax.random.key(0), (BATCH, TOKENS, WIDTH))


def init():
    return MODULE.init(jax.random.key(1), inputs(), 0, train=False)


def forward(variables, x, task):
    return MODULE.apply(
        variables,
        x,
        task,
        train=True,
        rngs={"router": jax.random.key(2)},
        mutable=["losses", "statistics"],
    )


def confident_first(variables, x):
    router = functools.partial(MODULE.router, noise_std=0.0, batch_priority=True)
    return MODULE.clone(router=router).apply(variables, x, 1, train=True)


def loss(variables, x, task):
    y, state = forward(variables, x, task)
    return jnp.mean(y**2) + state["losses"]["auxiliary"], state["statistics"]


def value_and_gradients(variables, x):
    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return step(variables, x, jnp.int32(1))


def checkpointed(variables, x):
    def step(variables, x):
        return jax.checkpoint(loss)(variables, x, jnp.int32(1))

    return jax.value_and_grad(step, argnums=(0, 1), has_aux=True)(variables, x)


def pullbacks_of_every_task(over_cotangents):
    """Task gradients of the sum of two layers, pulled back over one forward."""

    def gradients(variables, x):
        def features(variables):
            def body(x, task):
                return x + forward(variables, x, task)[0], None

            return jax.lax.scan(body, x, jnp.arange(2))[0]

        y, pullback = jax.vjp(features, variables)
        cotangents = jnp.stack([y, jnp.cos(y), y**2])
        return over_cotangents(pullback, cotangents)

    return gradients


def mapped(pullback, cotangents):
    return jax.lax.map(pullback, cotangents)


def batched(pullback, cotangents):
    return jax.vmap(pullback)(cotangents)


def unrolled(pullback, cotangents):
    return [pullback(cotangent) for cotangent in cotangents]


@functools.cache
def variables():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)),
        nn.unbox(jax.eval_shape(init)),
    )


@functools.cache
def run(function, **sizes):
    """The function's result and its compiled program, on a mesh of these sizes."""
    mesh = make_mesh(**sizes)
    shardings = param_shardings(jax.eval_shape(init), mesh, RULES)
    batch = NamedSharding(mesh, spec(RULES, ("batch", None, None)))
    arguments = jax.device_put((variables(), inputs()), (shardings, batch))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES.as_flax_rules()):
        compiled = jax.jit(function).lower(*arguments).compile()
        return compiled(*arguments), compiled.as_text()


def on_one_device(function):
    return jax.jit(function)(variables(), inputs())


def assert_close(actual, expected):
    """Equal to 1e-5 of each array's largest entry: single entries may cancel."""

    def compare(ours, theirs):
        error = np.max(np.abs(np.asarray(ours) - np.asarray(theirs)))
        assert error <= 1e-5 * np.max(np.abs(theirs))

    jax.tree.map(compare, actual, expected)


@pytest.fixture(scope="module")
def reference():
    result = on_one_device(value_and_gradients)
    (_, statistics), _ = result
    # Capacity must bind, or its independence of the mesh would not be tested.
    assert 0.05 < statistics["dropped"] < 0.5
    return result


@pytest.mark.parametrize(
    "sizes",
    [{"expert": 8}, {"expert": 4}, {"data": 8}, {"fsdp": 2, "expert": 2, "model": 2}],
)
def test_loss_and_gradients_agree_with_one_device(sizes, reference):
    result, _ = run(value_and_gradients, **sizes)
    assert_close(result, reference)


def test_checkpointed_layer_agrees(reference):
    result, _ = run(checkpointed, expert=4)
    assert_close(result, reference)


def test_confident_tokens_take_the_same_slots():
    expected = on_one_device(confident_first)
    result, _ = run(confident_first, data=2, expert=4)
    assert_close(result, expected)
    # Rows of zeros found their experts full, but never the four most confident of an
    # expert's first choices: ceil(0.8 · 2 · 16 / 8) is its capacity.
    kernel = variables()["params"]["router"]["gate"]["kernel"][1]
    gates = np.asarray(jax.nn.softmax(inputs() @ kernel)).reshape(8, 16, 8)
    refused = ~np.any(np.asarray(expected), axis=-1).reshape(8, 16)
    assert refused.any()
    for group, expert in np.ndindex(8, 8):
        first = np.flatnonzero(np.argmax(gates[group], axis=-1) == expert)
        most = first[np.argsort(-gates[group, first, expert])][:4]
        assert not refused[group, most].any()


@functools.cache
def task_gradients_on_one_device():
    rows = on_one_device(pullbacks_of_every_task(unrolled))
    return jax.tree.map(lambda *rows: np.stack(rows), *rows)


@pytest.mark.parametrize("over_cotangents", [mapped, batched])
def test_task_gradients_through_a_scan_agree(over_cotangents):
    result, _ = run(pullbacks_of_every_task(over_cotangents), expert=4)
    assert_close(result, task_gradients_on_one_device())


def test_experts_are_sharded_and_stay_so():
    ((_, _), (gradients, _)), _ = run(value_and_gradients, expert=4)
    kernel = gradients["params"]["experts"]["up"]["kernel"]
    assert kernel.sharding.spec[0] == "expert"
    assert kernel.addressable_shards[0].data.shape[0] == 2


def test_only_buffers_travel_and_only_by_all_to_all():
    _, program = run(value_and_gradients, expert=4)
    sent = travelling(program)
    assert {one.kind for one in sent} == {"all-to-all", "all-reduce"}
    # Forward to the experts and back, and the transposes of both. A device has 1 of 8
    # groups. Capacity: ceil(0.8 · 2 · 16 / 8) = 4 slots.
    exchanged = [one.bytes() for one in sent if one.kind == "all-to-all"]
    assert exchanged == [8 * 1 * 4 * WIDTH * 4] * 4
    # All else are gradients, and statistics of no more than a number an expert.
    assert summed(sent, at_least=9) == weights(2, WIDTH, 12, 8)


def test_a_sum_of_tokens_over_devices_is_told_from_one_of_gradients():
    def step(variables, x):
        def with_mean(variables, x):
            mean = jnp.mean(forward(variables, x, jnp.int32(1))[0], axis=0)
            return jnp.sum(mean**2)

        return jax.value_and_grad(with_mean)(variables, x)

    _, program = run(step, expert=4)
    expected = [(TOKENS, WIDTH), *weights(2, WIDTH, 12, 8)]
    assert summed(travelling(program), at_least=9) == sorted(expected)


def test_fsdp_gathers_weights_but_no_tokens():
    _, program = run(value_and_gradients, fsdp=2, expert=2, model=2)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)
    # The router, the halves of 4 experts that a model axis of 2 leaves, and a bias.
    weights = {"16,8", "4,16,6", "4,6,16", "4,16"}
    assert gathered
    assert set(gathered) <= weights


def test_groups_and_experts_must_divide_over_the_mesh():
    small = inputs()[:8]
    with (
        jax.set_mesh(make_mesh(expert=4)),
        pytest.raises(ValueError, match=r"4 routing groups.*multiple of 8"),
    ):
        MODULE.init(jax.random.key(0), small, 0, train=False)
    with (
        jax.set_mesh(make_mesh(expert=8)),
        pytest.raises(ValueError, match=r"num_experts=6 .* size 8"),
    ):
        MoE(num_experts=6, expert_hidden=4, group_size=1).init(
            jax.random.key(0), inputs(), train=False
        )


def test_a_pmapped_layer_computes_its_own_groups():
    x = inputs()
    quiet = MODULE.clone(router=functools.partial(MODULE.router, noise_std=0.0))

    values = variables()

    def step(x):
        return quiet.apply(values, x, 1, train=True)

    expected = jax.jit(step)(x)
    actual = jax.pmap(step, axis_name="data")(x.reshape(8, 2, TOKENS, WIDTH)).reshape(
        x.shape
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
