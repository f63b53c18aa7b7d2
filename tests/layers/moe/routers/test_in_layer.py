"""Layers with each of the routers: on a mesh as on one device."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.layers.moe.gates import TaskConditionedGate
from mtl_jax.layers.moe.routers import (
    ExpertChoice,
    LossFree,
    M3ViT,
    ModSquad,
    Soft,
    Switch,
)
from mtl_jax.sharding import Rules, make_mesh, param_shardings, spec

WIDTH, TOKENS, BATCH, EXPERTS = 12, 6, 16, 8
RULES = Rules()
COLLECTIONS = ["balance", "losses", "statistics"]
CONDITIONED = functools.partial(
    M3ViT, gate=functools.partial(TaskConditionedGate, as_released=True)
)


def layer(router, **changes):
    fields = {
        "num_experts": EXPERTS,
        "expert_hidden": 7,
        "group_size": 2,
        "capacity_factor": 1.0,
        "num_tasks": 3,
        "num_selected": 1 if router is Switch else 2,
    }
    return MoE(**{**fields, "router": router, **changes})


def inputs():
    return jax.random.normal(jax.random.key(0), (BATCH, TOKENS, WIDTH))


def abstract(module):
    init = functools.partial(module.init, train=False)
    return jax.eval_shape(init, jax.random.key(1), inputs(), 0)


def variables(module):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.float32(0.4 * rng.normal(size=leaf.shape)),
        nn.unbox(abstract(module)),
    )


def value_and_gradients(module, variables, x):
    """Output, gradients and collections of one task's pass in training."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x):
        y, state = module.apply(
            {**variables, "params": params},
            x,
            jnp.int32(1),
            train=True,
            rngs={"router": jax.random.key(2)},
            mutable=COLLECTIONS,
        )
        return jnp.mean(y**2) + state["losses"]["auxiliary"], (y, state)

    return loss(variables["params"], x)


@functools.cache
def on_one_device(module):
    step = jax.jit(functools.partial(value_and_gradients, module))
    return step(variables(module), inputs())


@pytest.mark.parametrize(
    "router", [ExpertChoice, LossFree, M3ViT, ModSquad, Soft, Switch]
)
def test_router_and_experts_learn_and_statistics_are_written(router):
    module = layer(router)
    (_, (_, state)), (gradient, _) = on_one_device(module)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf)
    by_task = jax.tree.leaves(gradient["router"])[0]
    assert not np.any(by_task[np.array([0, 2])])
    statistics = state["statistics"]
    assert statistics["load"].shape == statistics["gates"].shape == (EXPERTS,)
    np.testing.assert_allclose(np.sum(statistics["load"]), 1.0, rtol=1e-6)
    assert 0 < statistics["entropy"] < np.log(EXPERTS)
    assert state["losses"]["auxiliary"].shape == ()


@pytest.mark.parametrize(
    ("router", "sizes"),
    [
        *itertools.product(
            [ExpertChoice, Soft], [{"expert": 8}, {"data": 2, "expert": 4}, {"data": 8}]
        ),
        # Its bias comes from all groups.
        (LossFree, {"data": 2, "expert": 4}),
        (Switch, {"data": 2, "expert": 4}),
        pytest.param(Switch, {"expert": 8}, marks=pytest.mark.slow),
        *(
            pytest.param(router, sizes, marks=pytest.mark.slow)
            for router in (M3ViT, CONDITIONED, ModSquad)
            for sizes in ({"expert": 8}, {"data": 2, "expert": 4})
        ),
    ],
    ids=str,
)
def test_on_a_mesh(router, sizes):
    module = layer(router)
    mesh = make_mesh(**sizes)
    shardings = param_shardings(abstract(module), mesh, RULES)
    batch = NamedSharding(mesh, spec(RULES, ("batch", None, None)))
    arguments = jax.device_put((variables(module), inputs()), (shardings, batch))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES.as_flax_rules()):
        step = jax.jit(functools.partial(value_and_gradients, module))
        compiled = step.lower(*arguments).compile()
        result = compiled(*arguments)

    def compare(ours, theirs):
        # Of each array's largest entry: single ones may cancel. Fractions that are zero
        # are one less a sum.
        error = np.max(np.abs(np.asarray(ours) - np.asarray(theirs)))
        assert error <= 1e-5 * np.max(np.abs(theirs)) + np.finfo(np.float32).eps

    jax.tree.map(compare, result, on_one_device(module))
    # Buffers travel, and sums: forward to the experts and back, and their transposes.
    program = compiled.as_text()
    assert len(re.findall(r"\ball-to-all\(", program)) == 4 * ("expert" in sizes)
    others = r"\b(all-gather|collective-permute|reduce-scatter|all-gather-start)\("
    assert not re.findall(others, program)


def test_bias_of_a_layer_moves_by_the_counts_of_all_groups():
    module = layer(LossFree)
    before = np.asarray(variables(module)["balance"]["router"]["bias"])
    (_, (_, state)), _ = on_one_device(module)
    # A load of more than 1/8 is more than the mean count.
    expected = before.copy()
    expected[1] += 1e-3 * np.sign(1 / EXPERTS - state["statistics"]["load"])
    np.testing.assert_allclose(state["balance"]["router"]["bias"], expected, rtol=1e-6)


def apply(module, x, params=None):
    @jax.jit
    def compiled(params, x):
        return module.apply({"params": params}, x, train=False, mutable=["statistics"])

    params = variables_of_one_task(module, x) if params is None else params
    y, state = compiled(params, x)
    return y, state["statistics"], params


def variables_of_one_task(module, x):
    shapes = jax.eval_shape(
        functools.partial(module.init, train=False), jax.random.key(1), x
    )
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.float32(0.4 * rng.normal(size=leaf.shape)), nn.unbox(shapes)
    )["params"]


def expert(params, number, x):
    params = jax.tree.map(lambda leaf: np.float64(leaf[number]), params["experts"])
    hidden = x @ params["up"]["kernel"] + params["up"]["bias"]
    gelu = (
        0.5
        * hidden
        * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    )
    return gelu @ params["down"]["kernel"] + params["down"]["bias"]


def test_expert_choice_with_room_for_all_is_a_dense_mixture():
    router = functools.partial(ExpertChoice, capacity_factor=float(EXPERTS))
    x = inputs()
    y, statistics, params = apply(layer(router, num_tasks=None), x)
    logits = np.float64(x) @ np.float64(params["router"]["gate"]["kernel"])
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = sum(
        gates[..., e, None] * expert(params, e, np.float64(x)) for e in range(EXPERTS)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert statistics["dropped"] == 0.0


def test_tokens_that_no_expert_took_are_zero_and_counted():
    router = functools.partial(ExpertChoice, capacity_factor=0.5)
    y, statistics, _ = apply(layer(router, num_tasks=None), inputs())
    empty = np.all(np.asarray(y) == 0, axis=-1)
    # Eight experts take one of the twelve tokens each.
    assert 1 / 3 <= empty.mean() < 1.0
    np.testing.assert_allclose(statistics["dropped"], empty.mean(), rtol=1e-6)
    np.testing.assert_array_equal(statistics["load"], np.full(EXPERTS, 1 / EXPERTS))
    assert statistics["dead"] == 0.0


def test_one_slot_gives_all_tokens_the_same_of_a_convex_combination():
    router = functools.partial(Soft, capacity_factor=1 / 12)
    module = layer(router, num_tasks=None, num_experts=1, num_selected=1)
    x = inputs()
    y, _, params = apply(module, x)
    groups = np.float64(x).reshape(BATCH // 2, -1, WIDTH)
    slot = np.float64(params["router"]["slots"][:, 0, 0])
    unit = groups / np.linalg.norm(groups, axis=-1, keepdims=True)
    logits = np.float64(params["router"]["scale"]) * unit @ slot / np.linalg.norm(slot)
    weight = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = expert(params, 0, np.einsum("gs,gsd->gd", weight, groups))
    expected = np.repeat(expected[:, None], 2 * TOKENS, axis=1).reshape(x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_other_groups_do_not_matter():
    for router in (ExpertChoice, Soft):
        module = layer(router, num_tasks=None)
        x = inputs()
        before, _, params = apply(module, x)
        after, _, _ = apply(module, x.at[:2].multiply(-1.0), params)
        np.testing.assert_allclose(before[2:], after[2:], atol=1e-6)
        assert not np.allclose(before[:2], after[:2])


@pytest.mark.parametrize(
    ("router", "changes", "message"),
    [
        (Switch, {"num_selected": 2}, "num_selected=2, but Switch"),
        (LossFree, {"num_selected": 9}, "num_selected=9 is not between 1 and"),
        (
            ExpertChoice,
            {"execution": Execution("all_gather", "buffers")},
            r"execution=.* leave it None",
        ),
        (functools.partial(Soft, capacity_factor=0.0), {}, r"capacity_factor=0\.0"),
        (ModSquad, {"capacity_factor": 0.0}, r"capacity_factor=0\.0"),
    ],
)
def test_bad_input_is_named(router, changes, message):
    with pytest.raises(ValueError, match=message):
        abstract(layer(router, **changes))
