import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import (
    ConditionGate,
    Gate,
    TaskConditionedGate,
    check_task,
)
from mtl_jax.layers.moe.routers import (
    ExpertChoice,
    LossFree,
    ModSquad,
    NoisyTopK,
    Switch,
)


def random_like(gate, *arguments):
    """Random values for all parameters of a gate."""
    shapes = nn.unbox(jax.eval_shape(gate.init, jax.random.key(0), *arguments))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), shapes)


TOKENS = np.float32(np.random.default_rng(0).normal(size=(2, 3, 5)))


def test_each_task_has_its_map():
    gate = Gate(num_experts=4, num_tasks=3)
    variables = random_like(gate, TOKENS, 0)
    kernel = np.asarray(variables["params"]["kernel"])
    assert kernel.shape == (3, 5, 4)
    logits = jax.jit(gate.apply)
    for task in range(3):
        np.testing.assert_allclose(
            logits(variables, TOKENS, jnp.int32(task)),
            TOKENS @ kernel[task],
            rtol=1e-5,
            atol=1e-6,
        )


def test_logits_are_float32():
    gate = Gate(num_experts=4, kernel_init=nn.initializers.ones)
    # In bfloat16, 256 + 1 is 256.
    tokens = jnp.array([[[256.0, 1.0]]], jnp.bfloat16)
    logits, _ = gate.init_with_output(jax.random.key(0), tokens)
    np.testing.assert_array_equal(logits, np.full((1, 1, 4), 257, np.float32))
    assert logits.dtype == jnp.float32


def test_initial_values_do_not_depend_on_the_number_of_tasks():
    width = 400
    gate = Gate(num_experts=8, num_tasks=9, kernel_init=nn.initializers.lecun_normal())
    init = jax.jit(gate.init)(jax.random.key(0), jnp.ones((1, 1, width)), 0)
    kernel = init["params"]["kernel"]
    assert kernel.names == ("task", "embed", "expert_logits")
    deviation = np.asarray(kernel.value).std(axis=(1, 2))
    np.testing.assert_allclose(deviation, 1 / math.sqrt(width), rtol=0.1)
    assert not np.allclose(kernel.value[0], kernel.value[1])


@pytest.mark.parametrize("as_released", [False, True])
def test_task_conditioned_gate_appends_an_embedding_of_the_task(as_released):
    gate = TaskConditionedGate(
        num_experts=4, num_tasks=3, task_features=6, as_released=as_released
    )
    variables = random_like(gate, TOKENS, 0)
    params = jax.tree.map(np.float64, variables["params"])
    logits = jax.jit(gate.apply)
    for task in range(3):
        hidden = params["task_hidden"]["kernel"][task] + params["task_hidden"]["bias"]
        if as_released:
            normal = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in hidden])
            hidden = hidden * normal
        else:
            hidden = np.maximum(hidden, 0)
        layer = params["task_embedding"]
        embedding = hidden @ layer["kernel"] + layer["bias"]
        if as_released:
            deviation = np.sqrt(embedding.var() + 1e-6)
            embedding = (embedding - embedding.mean()) / deviation
            norm = params["task_norm"]
            embedding = embedding * norm["scale"] + norm["bias"]
        appended = np.concatenate([TOKENS, np.tile(embedding, (2, 3, 1))], axis=-1)
        whole = np.concatenate([params["kernel"], params["task_kernel"]])
        np.testing.assert_allclose(
            logits(variables, TOKENS, jnp.int32(task)),
            appended @ whole,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("make", "task", "message"),
    [
        (Gate, 0, "task=0 does not fit num_tasks=None"),
        (functools.partial(Gate, num_tasks=2), None, "task=None does not fit"),
        (functools.partial(Gate, num_tasks=2), 2, "task=2 is not one of num_tasks=2"),
        (functools.partial(Gate, num_tasks=2), -1, "task=-1 is not one of"),
        (TaskConditionedGate, 0, "num_tasks=None, but a task-conditioned gate"),
        (
            functools.partial(TaskConditionedGate, num_tasks=2),
            5,
            "task=5 is not one of num_tasks=2",
        ),
        (ConditionGate, None, "condition=None"),
        (ConditionGate, 0, "task=0 does not fit num_tasks=None"),
    ],
)
def test_bad_input_is_named(make, task, message):
    with pytest.raises(ValueError, match=message):
        make(num_experts=4).init(jax.random.key(0), TOKENS, task)


@pytest.mark.parametrize(
    "task", [0, 1, np.int32(1), np.int64(0), np.array(1), jnp.int32(1), jnp.uint8(0)]
)
def test_every_kind_of_integer_is_a_task(task):
    check_task(task, 2)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (np.int32(7), "task=7 is not one of num_tasks=2 tasks; count from 0"),
        (np.int64(-1), "task=-1 is not one of num_tasks=2"),
        (np.array(2), "task=2 is not one of num_tasks=2"),
        (jnp.int32(7), "task=7 is not one of num_tasks=2"),
        (1.0, "task=1.0 is not a single integer; give the index of one of num_tasks=2"),
        (jnp.float32(1), "is not a single integer"),
        ("a", "task='a' is not a single integer"),
        (True, "task=True is not a single integer"),
        (np.array([0, 1]), r"task=array\(\[0, 1\]\) is not a single integer"),
    ],
)
def test_a_task_that_is_none_of_them_is_refused_whatever_its_type(task, message):
    for make in (Gate, TaskConditionedGate):
        with pytest.raises(ValueError, match=message):
            make(num_experts=4, num_tasks=2).init(jax.random.key(0), TOKENS, task)


def test_the_type_of_a_traced_task_is_checked_and_its_value_is_not():
    jax.eval_shape(lambda task: check_task(task, 2), jnp.int32(7))
    with pytest.raises(ValueError, match="is not a single integer"):
        jax.eval_shape(lambda task: check_task(task, 2), jnp.float32(1))


def route(visible, router: Callable = NoisyTopK, num_selected=2):
    """Shapes of what a router with such a gate decides for the first of two tasks."""
    gate = functools.partial(Gate, visible_experts=visible)
    module = router(num_experts=4, num_selected=num_selected, num_tasks=2, gate=gate)
    return jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), TOKENS, 0, train=False)
    )


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ((2,), "has not one number for each of num_tasks=2; give as many"),
        ((2, 0), "task 1 cannot see 0 of num_experts=4; give an integer from 1 to 4"),
        ((-1, 4), "task 0 cannot see -1 of num_experts=4"),
        ((4, 5), r"visible_experts=\(4, 5\): task 1 cannot see 5 of num_experts=4"),
        ((4, 2.5), "task 1 cannot see 2.5 of num_experts=4"),
        ((4, 1), "task 1 sees 1, but each token goes to num_selected=2; show the task"),
    ],
)
def test_tasks_see_no_less_than_tokens_go_to_and_no_more_than_there_is(
    visible, message
):
    with pytest.raises(ValueError, match=message):
        route(visible)


def test_one_expert_is_enough_where_a_token_goes_to_one_or_experts_choose():
    route((4, 2))
    route((np.int64(1), 4), num_selected=1)
    route((1, 4), router=ExpertChoice)


def uniform(router, **fields):
    """What is decided for a task that sees three of eight experts, by equal logits."""
    gate = functools.partial(
        Gate, visible_experts=(3, 8), kernel_init=nn.initializers.zeros
    )
    module = router(num_experts=8, num_tasks=2, gate=gate, **fields)
    key = jax.random.key(0)
    routing, _ = module.init_with_output(
        {"params": key, "router": key}, TOKENS, 0, train=True
    )
    np.testing.assert_allclose(routing.probabilities[..., :3], 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(routing.probabilities[..., 3:], 0)
    return routing


def test_experts_that_a_task_does_not_see_have_no_part_in_losses():
    """Over all eight, importance and load would vary by 8/3 - 1."""
    noisy = uniform(NoisyTopK, num_selected=2)
    assert set(noisy.losses) == {"importance_loss", "load_loss"}
    for loss in noisy.losses.values():
        np.testing.assert_allclose(loss, 0, atol=1e-6)
    switch = uniform(Switch, num_selected=1)
    np.testing.assert_allclose(switch.losses["switch_loss"], 1, rtol=1e-6)


@pytest.mark.parametrize(
    "router",
    [ModSquad, LossFree, functools.partial(ExpertChoice, capacity_factor=1.0)],
)
def test_experts_that_a_task_does_not_see_are_not_dead_and_have_no_load(router):
    gate = functools.partial(
        Gate, visible_experts=(2, 4), kernel_init=nn.initializers.lecun_normal()
    )
    layer = MoE(
        num_experts=4,
        expert_hidden=2,
        group_size=1,
        capacity_factor=None,
        num_tasks=2,
        router=functools.partial(router, gate=gate),
    )
    tokens = jnp.float32(np.random.default_rng(2).normal(size=(2, 8, 5)))

    @jax.jit
    def apply(tokens):
        variables = nn.unbox(layer.init(jax.random.key(0), tokens, 0, train=False))
        return layer.apply(variables, tokens, 0, train=False, mutable=["statistics"])

    output, written = apply(tokens)
    statistics = written["statistics"]
    np.testing.assert_allclose(statistics["load"], [0.5, 0.5, 0, 0], rtol=1e-6)
    assert statistics["dead"] == 0
    # Two experts that choose take two tokens each, of eight.
    unchanged = np.all(np.asarray(output) == 0, axis=-1).mean()
    assert unchanged == (0 if router in (ModSquad, LossFree) else 0.5)
    np.testing.assert_allclose(statistics["dropped"], unchanged, rtol=1e-6)
