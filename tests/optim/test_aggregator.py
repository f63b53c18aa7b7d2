"""The Gramian and the aggregator protocol, on one device and on eight."""

import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gramian_methods import METHODS
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.experimental import aggregating

from mtl_jax import optim

NUM_TASKS = 3


def make_gradients(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (16, 8), "bias": (8,), "gain": ()}
    return {
        name: jnp.asarray(rng.normal(size=(NUM_TASKS, *shape)), dtype)
        for name, shape in shapes.items()
    }


def flatten(task_gradients):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(task_gradients)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def first(task_gradients):
    return jax.tree.map(lambda leaf: leaf[0], task_gradients)


def test_gramian_and_weighted_sum_match_flat_rows():
    gradients = make_gradients()
    rows = flatten(gradients)
    np.testing.assert_allclose(optim.gramian(gradients), rows @ rows.T, rtol=1e-5)
    weights = np.array([0.5, -2, 3], np.float32)
    combined = optim.weighted_sum(gradients, jnp.asarray(weights))
    assert jax.tree.structure(combined) == jax.tree.structure(gradients)
    stacked = jax.tree.map(lambda leaf: leaf[None], combined)
    np.testing.assert_allclose(flatten(stacked)[0], weights @ rows, atol=1e-5)


def test_bfloat16_is_accumulated_in_float32():
    # 4096 products of 1: a bfloat16 sum would stop at 256.
    gradients = {"kernel": jnp.ones((2, 64, 64), jnp.bfloat16)}
    matrix = optim.gramian(gradients)
    assert matrix.dtype == jnp.float32
    np.testing.assert_array_equal(matrix, np.full((2, 2), 4096))
    combined = optim.weighted_sum(gradients, jnp.array([256.0, 1.0]))
    assert combined["kernel"].dtype == jnp.bfloat16


def test_float64_stays_float64():
    with jax.enable_x64(True):
        gradients = make_gradients(np.float64)
        rows = flatten(gradients)
        matrix = optim.gramian(gradients)
        assert matrix.dtype == jnp.float64
        np.testing.assert_allclose(matrix, rows @ rows.T, rtol=1e-13)
        aggregator = optim.mgda(NUM_TASKS)
        state = aggregator.init(first(gradients))
        combined, after = aggregator.update(gradients, state)
        assert state.weights.dtype == after.weights.dtype == jnp.float64
        assert combined["kernel"].dtype == jnp.float64


def test_cosine_similarity_and_conflict_rate():
    # Rows (2, 0), (-1, 1), (0, 0), (0, 3): one conflict in six pairs; of the three
    # pairs without the last task also one; none without the second.
    rows = np.array([[2, 0], [-1, 1], [0, 0], [0, 3]], np.float32)
    matrix = jnp.asarray(rows @ rows.T)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(
        optim.cosine_similarity(matrix),
        [[1, -half, 0, 0], [-half, 1, 0, half], [0, 0, 0, 0], [0, half, 0, 1]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(optim.conflict_rate(matrix), 1 / 6, rtol=1e-6)
    for active, rate in (([1, 1, 1, 0], 1 / 3), ([1, 0, 1, 1], 0), ([1, 0, 0, 0], 0)):
        result = optim.conflict_rate(matrix, jnp.array(active, bool))
        np.testing.assert_allclose(result, rate, rtol=1e-6)


def test_random_method_draws_anew_each_step_and_repeats_by_seed():
    gradients = {"kernel": jax.random.normal(jax.random.key(1), (8, 4))}
    params = first(gradients)

    def run(seed):
        aggregator = optim.pcgrad(8, seed=seed)
        state, weights = aggregator.init(params), []
        for _ in range(3):
            _, state = aggregator.update(gradients, state)
            weights.append(np.asarray(state.weights))
        return weights

    one, again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize(
    "make", [optim.sum, optim.pcgrad, optim.mgda, optim.cagrad, optim.upgrad]
)
def test_compiles_once(make):
    gradients = make_gradients()
    aggregator = make(NUM_TASKS)
    state = aggregator.init(first(gradients))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(aggregator.update, n=1))
    for present in (True, False, True):
        active = jnp.array([True, True, present])
        _, state = update(gradients, state, active=active)
    assert state.weights.shape == (NUM_TASKS,)


def test_chain_after_transforms_the_aggregate():
    gradients = make_gradients()
    params = first(gradients)
    chained = optim.chain_after(
        optim.sum(NUM_TASKS),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    )
    state = chained.init(params)
    active = jnp.array([True, False, True])
    updates, (aggregator_state, _) = jax.jit(chained.update)(
        gradients, state, params, losses=jnp.ones(NUM_TASKS), active=active
    )
    rows = flatten(gradients)
    total = rows[0] + rows[2]
    expected = -0.1 * total / np.linalg.norm(total)
    stacked = jax.tree.map(lambda leaf: leaf[None], updates)
    np.testing.assert_allclose(flatten(stacked)[0], expected, atol=1e-7)
    np.testing.assert_array_equal(aggregator_state.weights, [1, 0, 1])


def test_chain_after_passes_extra_keywords_on():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda leaf: factor * leaf, updates), state

    scaling = optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), update
    )
    chained = optim.chain_after(optim.sum(2), scaling)
    gradients = {"kernel": jnp.ones((2, 3))}
    updates, _ = chained.update(
        gradients, chained.init(first(gradients)), factor=jnp.array(2.0)
    )
    np.testing.assert_array_equal(updates["kernel"], [4, 4, 4])


@pytest.mark.parametrize(
    ("first_of_two", "second_of_two"),
    [
        (optax.clip_by_global_norm(1.0), optim.sum(2)),
        (optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        (optim.sum(2), optim.mgda(2)),
        (optim.sum, optax.sgd(0.1)),
    ],
)
def test_chain_after_refuses_the_wrong_order(first_of_two, second_of_two):
    with pytest.raises(TypeError, match="takes an aggregator, then a transformation"):
        optim.chain_after(first_of_two, second_of_two)


@pytest.mark.parametrize(
    "aggregator",
    [
        optim.sum(NUM_TASKS),
        optim.from_rows(
            lambda g, active: optim.weighted_sum(g, active.astype(jnp.float32)),
            NUM_TASKS,
        ),
        optim.chain_after(optim.sum(NUM_TASKS), optax.identity()),
        optim.momentum(optim.sum(NUM_TASKS)),
        optim.every(optim.sum(NUM_TASKS), 2),
        optim.normalize(optim.sum(NUM_TASKS), "none"),
        optim.grouped(optim.sum, NUM_TASKS, "kernel"),
        optim.where(lambda path: path == "bias", optim.sum(NUM_TASKS)),
    ],
)
def test_follows_the_protocol_of_optax(aggregator):
    assert isinstance(aggregator, aggregating.Aggregator)
    process = aggregating.process(optax.identity(), aggregator, optax.sgd(0.1))
    assert isinstance(process, aggregating.Aggregator)
    gradients = make_gradients()
    params = first(gradients)
    updates, state = jax.jit(process.update)(gradients, process.init(params), params)
    stacked = jax.tree.map(lambda leaf: leaf[None], updates)
    expected = -0.1 * flatten(gradients).sum(axis=0)
    np.testing.assert_allclose(flatten(stacked)[0], expected, atol=1e-6)
    process.update(gradients, state)


def test_keywords_pass_through_a_process_of_optax():
    aggregator = optim.normalize(optim.sum(NUM_TASKS), "loss")
    process = aggregating.process(
        optax.with_extra_args_support(optax.identity()),
        aggregator,
        optax.with_extra_args_support(optax.sgd(0.1)),
    )
    gradients = make_gradients()
    active = jnp.array([True, False, True])
    updates, _ = process.update(
        gradients,
        process.init(first(gradients)),
        losses=jnp.array([1.0, 2, 4]),
        active=active,
    )
    rows = flatten(gradients)
    stacked = jax.tree.map(lambda leaf: leaf[None], updates)
    expected = -0.1 * (rows[0] + rows[2] / 4)
    np.testing.assert_allclose(flatten(stacked)[0], expected, atol=1e-6)


def shard(task_gradients):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    specs = {"kernel": (None, "fsdp"), "bias": (None, "fsdp"), "gain": ()}
    shardings = {
        name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()
    }
    return jax.device_put(task_gradients, shardings), shardings


def collectives(compiled):
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    pattern = rf"= (.*?) ({kinds})(?:-start)?\("
    return [match.groups() for match in re.finditer(pattern, compiled.as_text())]


def test_sharded_gramian_reduces_only_small_matrices():
    gradients, _ = shard(make_gradients())
    [(shapes, kind)] = collectives(jax.jit(optim.gramian).lower(gradients).compile())
    assert kind == "all-reduce"
    # One matrix for each of the two sharded leaves.
    assert re.findall(r"f32\[([\d,]*)\]", shapes) == ["3,3", "3,3"]


@pytest.mark.parametrize("make", [optim.pcgrad, optim.mgda, optim.cagrad, optim.upgrad])
def test_sharded_update_agrees_and_gathers_nothing(make):
    gradients = make_gradients()
    sharded, shardings = shard(gradients)
    aggregator = make(NUM_TASKS)
    state = aggregator.init(first(gradients))
    expected, expected_state = aggregator.update(gradients, state)

    out = {
        name: NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        for name, sharding in shardings.items()
    }
    update = jax.jit(aggregator.update, out_shardings=(out, None))
    compiled = update.lower(sharded, state).compile()
    assert [kind for _, kind in collectives(compiled)] == ["all-reduce"]
    result, new_state = update(sharded, state)
    np.testing.assert_allclose(new_state.weights, expected_state.weights, rtol=1e-5)
    for name, leaf in expected.items():
        np.testing.assert_allclose(result[name], leaf, rtol=1e-4, atol=1e-5)
        assert result[name].sharding.spec == out[name].spec


# Beside the table's: those that take losses or further batches, and more.
REDUCING = {name: method.make for name, method in METHODS.items()} | {
    name: getattr(optim, name)
    for name in ("mgda_frank_wolfe", "gradnorm", "modo", "sdmgrad")
}
WITHOUT_GRAMIAN = {
    "sum": optim.sum,
    "mean": optim.mean,
    "random": optim.random,
    "constant": lambda num_tasks: optim.constant(num_tasks, range(num_tasks)),
}


@pytest.mark.parametrize("name", REDUCING | WITHOUT_GRAMIAN)
def test_sharded_update_reduces_one_matrix_of_tasks(name):
    num_tasks = 5
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    stacked = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    leaf = jax.ShapeDtypeStruct((num_tasks, 16, 4), jnp.float32, sharding=stacked)
    gradients = {"kernel": leaf}
    aggregator = (REDUCING | WITHOUT_GRAMIAN)[name](num_tasks)
    keywords: dict = {"active": jnp.ones(num_tasks, bool)}
    if name == "gradnorm":
        keywords["losses"] = jnp.ones(num_tasks)
    if name in ("modo", "sdmgrad"):
        keywords |= {"second": gradients, "third": gradients}
    state = aggregator.init({"kernel": jnp.zeros(leaf.shape[1:])})
    out = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp"))}
    update = jax.jit(aggregator.update, out_shardings=(out, None))
    found = collectives(update.lower(gradients, state, **keywords).compile())
    if name in WITHOUT_GRAMIAN:
        assert found == []
        return
    [(shape, kind)] = found
    assert kind == "all-reduce"
    assert re.sub(r"\{.*?\}", "", shape) == "f32[5,5]"


def test_sum_compiles_its_gramian_away():
    gradients, _ = shard(make_gradients())
    aggregator = optim.sum(NUM_TASKS)
    state = aggregator.init(first(gradients))
    compiled = jax.jit(aggregator.update).lower(gradients, state).compile()
    assert collectives(compiled) == []
    assert " dot(" not in compiled.as_text()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.sum(0), "num_tasks is 0"),
        (lambda: optim.pcgrad(-1), "num_tasks is -1"),
        (lambda: optim.cagrad(2, c=-0.1), "c is -0.1"),
        (lambda: optim.upgrad(2, regularization=-1), "regularization is -1"),
        (lambda: optim.gramian({}), "no leaves"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_wrong_leading_axis_is_refused(shape):
    aggregator = optim.sum(3)
    gradients = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(shape)}
    with pytest.raises(ValueError, match=r"\['bias'\] has shape .* num_tasks is 3"):
        aggregator.update(gradients, aggregator.init(None))


def test_needs_only_jax_and_optax():
    script = (
        "import sys, mtl_jax.optim;"
        "unwanted = {'flax', 'orbax', 'grain', 'fiddle', 'tensorflow',"
        " 'tensorflow_datasets', 'matplotlib', 'rich', 'scipy.optimize'};"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
