import functools
import json

import jax
import jax.numpy as jnp
import pytest

from mtl_jax import configuration
from mtl_jax.layers.moe.gates import Gate, TaskConditionedGate
from mtl_jax.train import Experiment, build_program, validate

VARIANTS = (
    *("main", "task_conditioned", "single_gate", "dense"),
    *("tiny", "small", "base"),
)


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    """Optax's schedules mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def build(variant, smoke=False) -> Experiment:
    config = configuration.load_config(f"m3vit:{variant}", smoke=smoke)
    return configuration.build(config)


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_its_document(variant, smoke):
    config = configuration.load_config(f"m3vit:{variant}", smoke=smoke)
    document = configuration.to_document(config, "m3vit")
    saved = json.loads(json.dumps(document))
    assert configuration.from_document(saved) == config


@pytest.mark.parametrize("variant", ["main", "task_conditioned", "dense", "small"])
def test_variants_fit_together(variant):
    experiment = build(variant, smoke=True)
    validate(experiment)
    build_program(experiment, jax.devices()[:1])


def moe_of(variant):
    moe = build(variant).trunk.moe()
    router = moe.router(num_experts=16, num_selected=4, num_tasks=4)
    return moe, router


@pytest.mark.parametrize("variant", ["main", "task_conditioned", "tiny", "base"])
def test_a_token_costs_what_the_dense_mlp_does(variant):
    moe, _ = moe_of(variant)
    trunk = build(variant).trunk
    assert (moe.num_experts, moe.num_selected) == (16, 4)
    hidden = moe.num_selected * moe.expert_hidden
    assert hidden == trunk.mlp_ratio * trunk.width


def test_gates_are_by_task_conditioned_on_it_or_shared():
    assert moe_of("main")[1].gate.func is Gate
    assert moe_of("task_conditioned")[1].gate.func is TaskConditionedGate
    assert build("task_conditioned").trunk.num_tasks == 4
    assert build("single_gate").trunk.num_tasks is None
    assert build("dense").trunk.moe is None


def test_the_small_trunk_has_the_published_number_of_parameters():
    """By hand, from the architecture of the released code."""
    experiment = build("small")
    image = next(iter(experiment.inputs.values()))
    init = functools.partial(experiment.trunk.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), image, jnp.int32(0))["params"]
    width, grid, tasks, experts = 384, 32, 4, 16
    attention = 4 * width * width + 4 * width + 4 * width  # with its two layer norms
    mlp = 2 * 4 * width * width + 4 * width + width
    expert = 2 * width * width + 2 * width
    embedding = 3 * 16 * 16 * width + width
    trunk = (
        embedding
        + (grid * grid + 1) * width  # positions, and the token of the class
        + 12 * attention
        + 6 * mlp
        + 6 * (experts * expert + tasks * width * experts)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == trunk
