import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mtl_jax.layers.moe.gates import ConditionGate, Gate, TaskConditionedGate


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
