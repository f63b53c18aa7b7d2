"""Every row method: worked numbers, independent loops, shared properties."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from row_methods import (
    METHODS,
    NUM_PARAMS,
    NUM_TASKS,
    REMEMBERING,
    assert_close,
    make_sequence,
    precision,
    run,
    to_flat,
    to_tree,
)

from mtl_jax.optim import db_mtl, excess_mtl, graddrop, moco, trimmed_mean
from mtl_jax.optim.graddrop import drop
from mtl_jax.optim.rows import zero_rows

every_method = pytest.mark.parametrize("name", METHODS)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def first(task_gradients):
    return jax.tree.map(lambda leaf: leaf[0], task_gradients)


def pair(*entries):
    return jnp.asarray(np.array(entries, np.float32))


def start(aggregator, params=None):
    params = np.zeros(2, np.float32) if params is None else params
    return jax.jit(aggregator.init)(params), jax.jit(aggregator.update)


def test_graddrop_worked():
    # Purities 6/10, 1, 1. A number below keeps the 6, one above or equal the -4.
    rows = pair([-4, 1, 1], [6, 1, 1])
    for uniform, expected in ((0.5, (6, 2, 2)), (0.6, (-4, 2, 2)), (0.9, (-4, 2, 2))):
        result = drop(rows, jnp.full(3, uniform))
        np.testing.assert_allclose(result, expected)
    # -4 leaks a quarter where it is dropped, 6 a half.
    for uniform, expected in ((0.5, (5, 2, 2)), (0.9, (-1, 2, 2))):
        result = drop(rows, jnp.full(3, uniform), leak=(0.25, 0.5))
        np.testing.assert_allclose(result, expected)
    only_first = drop(rows, jnp.full(3, 0.5), jnp.array([True, False]))
    np.testing.assert_allclose(only_first, (-4, 1, 1))


def test_db_mtl_worked():
    # Log gradients (1.5, 2) and (0, 4), halved: lengths 1.25 and 2, weights 1.6 and 1.
    # Then halves of (0.75, 1) + (5.25, 7) and (0, 2) + (0, -4): lengths 5 and 1.
    state, update = start(db_mtl(2, beta=0.5))
    one, state = update(pair([3, 4], [0, 2]), state, losses=jnp.array([2.0, 0.5]))
    np.testing.assert_allclose(one, (1.2, 3.6), rtol=1e-6)
    two, state = update(pair([5.25, 7], [0, -4]), state, losses=jnp.ones(2))
    np.testing.assert_allclose(two, (3, -1), rtol=1e-6)
    np.testing.assert_allclose(state.memory.rows, [[3, 4], [0, -1]], rtol=1e-6)


def test_moco_worked():
    # y = ½ · 2 · (0.6, 0.8) and ½ · (0, 1); G = [[1, 0.4], [0.4, 0.25]], G λ =
    # (0.7, 0.325), so that λ_1 = sigmoid(−0.0375) = 0.490626 and λ_2 = 0.509374.
    state, update = start(moco(2))
    result, state = update(pair([3, 4], [0, 5]), state, losses=jnp.array([2.0, 1]))
    np.testing.assert_allclose(state.memory.weights, (0.490626, 0.509374), rtol=1e-6)
    np.testing.assert_allclose(result, (0.294376, 0.647188), rtol=2e-6)


def test_excess_mtl_worked():
    # First risks 1 + 1 and 2. Then S = (1, 4) and (4, 0), risks 3/2 and 0, ratios 3/4
    # and 0; a rate of 4/3 log 3 makes that weights 3 and 1, which become 1.5 and 0.5.
    state, update = start(excess_mtl(2, learning_rate=4 / 3 * np.log(3)))
    one, state = update(pair([1, 1], [2, 0]), state)
    np.testing.assert_allclose(one, (3, 1), rtol=1e-6)
    two, state = update(pair([0, 3**0.5], [0, 0]), state)
    np.testing.assert_allclose(two, (0, 1.5 * 3**0.5), rtol=1e-6)
    np.testing.assert_allclose(np.exp(state.memory.log_weights), (1.5, 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("active", "trim", "expected"),
    [
        ("11111", 0, 21),
        ("11111", 1, 8 / 3),  # 1, 2, 5 remain
        ("11111", 2, 2),
        ("11111", 9, 2),  # the median
        ("11101", 1, 1.5),  # 1, 2 remain
        ("11101", 2, 1.5),  # the two in the middle
        ("11000", 1, 3),
        ("00010", 1, 100),
        ("00000", 1, 0),
    ],
)
def test_trimmed_mean_worked(active, trim, expected):
    rows = pair([1], [5], [2], [100], [-3])
    mask = jnp.array([digit == "1" for digit in active])
    aggregator = trimmed_mean(5, trim=trim)
    result, _ = aggregator.update(rows, aggregator.init(None), active=mask)
    np.testing.assert_allclose(result, [expected], rtol=1e-6)


@every_dtype
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("db_mtl", {}),
        ("db_mtl", {"beta": 0.7, "sigma": 0.5}),
        ("moco", {}),
        ("moco", {"beta": 0.9, "beta_sigma": 0.3, "gamma": 0.4, "rho": 0.5}),
        ("excess_mtl", {}),
        ("excess_mtl", {"learning_rate": 1.0}),
        ("trimmed_mean", {}),
    ],
)
def test_sequences_match_loops(name, options, dtype):
    for ratio in (1, 1e4):
        rows, losses, active = make_sequence(ratio=ratio)
        rows[3, 2], active[3, 2] = 0, True
        losses[2, 1], active[2, 1] = 0, True
        loop = METHODS[name].loop(NUM_TASKS, **options)
        next(loop)
        expected = [loop.send(step) for step in zip(rows, losses, active, strict=True)]
        result, _ = run(name, rows, losses, active, dtype, **options)
        assert_close(result, np.array(expected), dtype)


@every_dtype
def test_drop_matches_its_formula_and_its_mean(dtype):
    # Numbers evenly spaced in (0, 1) integrate the step functions to 1/1000.
    rng = np.random.default_rng(0)
    rows, leak = rng.normal(size=(5, 7)), np.array([0, 0.2, 0.5, 1, 0.9])
    rows[:, 3], rows[:, 4] = 0, np.abs(rows[:, 4])
    purity = 0.5 * (1 + rows.sum(axis=0) / np.maximum(np.abs(rows).sum(axis=0), 1e-300))
    grid = (np.arange(1000) + 0.5)[:, None] / 1000 * np.ones(7)
    with precision(dtype):
        results = jax.vmap(
            lambda uniform: drop(jnp.asarray(rows, dtype), uniform, leak=leak)
        )(jnp.asarray(grid, dtype))
        results = np.asarray(results)
    assert results.dtype == dtype
    for uniform, result in zip(grid[::97], results[::97], strict=True):
        mask = np.where(uniform < purity, rows > 0, rows < 0)
        expected = np.sum((leak[:, None] + (1 - leak[:, None]) * mask) * rows, axis=0)
        assert_close(result, expected, dtype)
    free = (1 - leak)[:, None] * rows
    positive, negative = (
        np.maximum(free, 0).sum(axis=0),
        np.minimum(free, 0).sum(axis=0),
    )
    mean = leak @ rows + purity * positive + (1 - purity) * negative
    np.testing.assert_allclose(results.mean(axis=0), mean, atol=5e-3)


def test_graddrop_draws_each_coordinate_apart():
    # Two opposite rows of ones in two leaves: each entry is 1 or -1, a fair coin.
    aggregator = graddrop(2, seed=3)
    signs = jnp.array([1.0, -1.0])[:, None] * jnp.ones((2, 64))
    gradients = {"one": signs, "two": signs}

    def step(state, _):
        direction, state = aggregator.update(gradients, state)
        return state, jnp.stack([direction["one"], direction["two"]])

    _, draws = jax.lax.scan(step, aggregator.init(None), length=400)
    draws = np.asarray(draws).reshape(400, 128)
    np.testing.assert_array_equal(np.abs(draws), 1)
    # Means and correlations of 400 coins have deviation 1/20.
    assert np.abs(draws.mean(axis=0)).max() < 5 / 20
    correlations = draws.T @ draws / 400 - np.eye(128)
    assert np.abs(correlations).max() < 6 / 20


@every_method
def test_absent_tasks_have_no_influence(name):
    rows, losses, _ = make_sequence()
    present = np.array([True, True, False, True])
    active = np.tile(present, (len(rows), 1))
    rows[:, 2], losses[:, 2] = 1e3, np.nan
    result, _ = run(name, rows, losses, active)
    fewer, _ = run(name, rows[:, present], losses[:, present])
    assert_close(result, fewer)


@every_method
def test_no_active_task_gives_zero(name):
    rows, losses, _ = make_sequence(steps=3)
    none = np.zeros((3, NUM_TASKS), bool)
    result, after = run(name, rows, losses, none)
    np.testing.assert_array_equal(result, 0)
    _, before = run(name, rows[:0])
    chex.assert_trees_all_equal(after.memory, before.memory)


@pytest.mark.parametrize("name", REMEMBERING)
def test_memory_of_an_absent_task_is_untouched(name):
    rows, losses, _ = make_sequence(steps=3)
    _, before = run(name, rows[:2], losses[:2])
    active = np.array([[True, False, True, True]])
    _, after = run(name, rows[2:], losses[2:], active, state=before)
    compared = 0
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        if old.ndim:
            np.testing.assert_array_equal(new[1], old[1])
            changed = np.any(np.asarray(new != old).reshape(NUM_TASKS, -1), axis=1)
            compared += changed[0] & changed[3]
    assert compared >= 4


G = np.zeros(NUM_PARAMS)
G[[0, 5, 11]] = 0, 3, -4


@every_dtype
@every_method
def test_degenerate_rows(name, dtype):
    with_zero, duplicates, opposite = METHODS[name].outcomes
    for row, outcome in ((0 * G, with_zero), (G, duplicates), (-G, opposite)):
        result, _ = run(name, np.array([[G, row]] * 3), dtype=dtype)
        if outcome is None:
            np.testing.assert_allclose(np.abs(result), np.abs([G] * 3), rtol=1e-6)
        else:
            np.testing.assert_allclose(result[0], outcome * G, rtol=1e-6, atol=1e-7)
            # Later steps lengthen or shorten it; nothing else is in its span.
            across = result - np.outer(result @ G / 25, G)
            np.testing.assert_allclose(across, 0, atol=1e-6)
    result, state = run(name, np.zeros((3, 2, NUM_PARAMS)), dtype=dtype)
    np.testing.assert_array_equal(result, 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.memory))
    # All-zero first steps leave nothing behind that would spoil the next ones.
    result, _ = run(name, np.array([[0 * G, G], [G, 0 * G], [G, -3 * G]]), dtype=dtype)
    assert np.all(np.isfinite(result))
    assert np.linalg.norm(result[2]) > 0


@every_dtype
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@every_method
def test_scale_law(name, scale, dtype):
    rows, losses, active = make_sequence(ratio=1e4)
    result, _ = run(name, rows, losses, active, dtype)
    scaled, _ = run(name, scale * rows, losses, active, dtype)
    power = 0 if name == "moco" else 1
    assert_close(scaled / scale**power, result, dtype)


@every_dtype
@pytest.mark.parametrize("name", REMEMBERING)
def test_units_of_one_task(name, dtype):
    # DB-MTL: no unit of a loss matters. MoCo: no length of a gradient does. ExcessMTL:
    # the same weights.
    rows, losses, active = make_sequence()
    units = np.array([1, 1e-6, 1e4, 1e6])
    result, state = run(name, rows, losses, active, dtype)
    new_losses = losses * units if name == "db_mtl" else losses
    other, after = run(name, rows * units[:, None], new_losses, active, dtype)
    if name == "excess_mtl":
        one, two = state.memory.log_weights, after.memory.log_weights
        np.testing.assert_allclose(one, two, atol=1e-6)
        assert np.ptp(one) > 1e-3
    else:
        assert_close(other, result, dtype)


@every_dtype
@every_method
def test_permutation_changes_nothing(name, dtype):
    rows, losses, active = make_sequence()
    order = np.array([2, 0, 3, 1])
    result, _ = run(name, rows, losses, active, dtype)
    permuted, _ = run(name, rows[:, order], losses[:, order], active[:, order], dtype)
    assert_close(permuted, result, dtype)


def _key_data(state):
    return jax.tree.map(
        lambda leaf: (
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        ),
        state,
    )


@every_method
def test_compiles_once_and_repeats_bit_for_bit(name):
    rows, losses, active = make_sequence()
    aggregator = METHODS[name].make(NUM_TASKS)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(aggregator.update, n=1))

    def go_on(state, steps):
        directions = []
        for t in steps:
            direction, state = update(
                to_tree(rows[t], np.float32),
                state,
                losses=jnp.asarray(losses[t], np.float32),
                active=jnp.asarray(active[t]),
            )
            directions.append(to_flat(direction))
        return directions, state

    state = aggregator.init(to_tree(np.zeros(NUM_PARAMS), np.float32))
    before, middle = go_on(state, range(3))
    # What a checkpoint keeps: arrays of numbers.
    saved = jax.tree.map(np.array, _key_data(middle))
    after, end = go_on(middle, range(3, 6))
    restored = jax.tree.map(jnp.asarray, saved)
    if middle.key is not None:
        restored = restored._replace(key=jax.random.wrap_key_data(restored.key))
    resumed, resumed_end = go_on(restored, range(3, 6))
    np.testing.assert_array_equal(resumed, after)
    chex.assert_trees_all_equal(resumed_end.memory, end.memory)
    again, _ = go_on(state, range(6))
    np.testing.assert_array_equal(again, before + after)


def test_graddrop_depends_on_its_seed():
    rows = make_sequence(steps=2)[0]
    rows[1] = rows[0]
    one, _ = run("graddrop", rows)
    other, _ = run("graddrop", rows, seed=1)
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one[0], other[0])


@every_method
def test_bfloat16_is_accumulated_in_float32(name):
    # Weighed up in bfloat16, 128 tasks of 1 + 2^-7 would drift by percents.
    gradients = {"kernel": jnp.full((128, 2, 3), 1 + 2**-7, jnp.bfloat16)}
    state, update = start(METHODS[name].make(128), first(gradients))
    losses = jnp.ones(128, jnp.bfloat16)
    direction, state = update(gradients, state, losses=losses)
    assert direction["kernel"].dtype == jnp.bfloat16
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state.memory)}
    assert dtypes <= {np.dtype(np.float32), np.dtype(np.int32)}
    expected = {
        "graddrop": 128 * (1 + 2**-7),
        "db_mtl": 12.8 * (1 + 2**-7),
        "moco": 0.5 / 6**0.5,
        "excess_mtl": 128 * (1 + 2**-7),
        "trimmed_mean": 1 + 2**-7,
    }
    rounding = 2.0**-8
    np.testing.assert_allclose(
        np.asarray(direction["kernel"], np.float32), expected[name], rtol=rounding
    )


def test_excess_mtl_keeps_adding_up_bfloat16():
    gradients = {"kernel": jnp.ones((1, 2), jnp.bfloat16)}
    state, update = start(excess_mtl(1), first(gradients))
    squares = {"kernel": jnp.full((1, 2), 256.0)}
    state = state._replace(memory=state.memory._replace(squares=squares))
    _, state = update(gradients, state)
    np.testing.assert_array_equal(state.memory.squares["kernel"], [[257, 257]])


@every_method
def test_sharded_update_agrees_and_gathers_nothing(name):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    shapes = {"kernel": (16, 8), "bias": (8,), "gain": ()}
    specs = {"kernel": ("fsdp",), "bias": ("fsdp",), "gain": ()}
    rng = np.random.default_rng(0)
    stacks = [
        {name: rng.normal(size=(NUM_TASKS, *shape)) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    stacks = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stacks)
    params = first(stacks[0])
    out = {k: NamedSharding(mesh, PartitionSpec(*spec)) for k, spec in specs.items()}
    stacked = {
        k: NamedSharding(mesh, PartitionSpec(None, *spec)) for k, spec in specs.items()
    }
    losses = jnp.linspace(0.5, 2, NUM_TASKS)
    aggregator = METHODS[name].make(NUM_TASKS)
    plain, state = jax.jit(aggregator.update), aggregator.init(params)
    sharded_state = aggregator.init(jax.device_put(params, out))
    update = jax.jit(aggregator.update, out_shardings=(out, None))
    lowered = update.lower(
        jax.device_put(stacks[0], stacked), sharded_state, losses=losses
    )
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    pattern = rf"= (.*?) ({kinds})(?:-start)?\("
    found = re.findall(pattern, lowered.compile().as_text())
    assert [kind for _, kind in found] == ["all-reduce"] * METHODS[name].collectives
    sizes = re.findall(r"f32\[([\d,]*)\]", " ".join(shapes for shapes, _ in found))
    assert all(size in ("4", "4,4") for size in sizes)
    for gradients in stacks:
        expected, state = plain(gradients, state, losses=losses)
        gradients = jax.device_put(gradients, stacked)
        result, sharded_state = update(gradients, sharded_state, losses=losses)
        for leaf in shapes:
            np.testing.assert_allclose(
                result[leaf], expected[leaf], rtol=1e-4, atol=1e-6
            )
            assert result[leaf].sharding.spec == out[leaf].spec
    if name in REMEMBERING:
        rows, *_ = sharded_state.memory
        assert rows["kernel"].sharding.spec == stacked["kernel"].spec


def test_zero_rows_are_sharded_as_their_parameters():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    kernel = jax.device_put(jnp.ones((3, 16), jnp.bfloat16), sharding)
    rows = zero_rows({"kernel": kernel}, 2)["kernel"]
    assert rows.shape == (2, 3, 16)
    assert rows.dtype == jnp.float32
    assert rows.sharding.spec == PartitionSpec(None, None, "fsdp")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graddrop(0), "num_tasks is 0"),
        (lambda: graddrop(2, leak=1.5), "leak is 1.5"),
        (lambda: graddrop(3, leak=(0.5, 0.5)), "each of the 3 tasks"),
        (lambda: db_mtl(2, beta=1.0), "beta is 1.0"),
        (lambda: db_mtl(2, sigma=-1), "sigma is -1"),
        (lambda: moco(2, beta=0), "beta is 0"),
        (lambda: moco(2, gamma=-0.1), "gamma is -0.1"),
        (lambda: excess_mtl(2, learning_rate=-1), "learning_rate is -1"),
        (lambda: trimmed_mean(2, trim=-1), "trim is -1"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", REMEMBERING)
def test_unlike_gradients_are_refused(name):
    aggregator = METHODS[name].make(2)
    state = aggregator.init({"kernel": jnp.zeros(3)})
    for gradients in ({"features": jnp.ones((2, 3))}, {"kernel": jnp.ones((2, 4))}):
        with pytest.raises(ValueError, match="differ in structure or shapes"):
            aggregator.update(gradients, state, losses=jnp.ones(2))


@pytest.mark.parametrize("make", [db_mtl, moco])
def test_missing_losses_are_refused(make):
    gradients = {"kernel": jnp.ones((2, 3))}
    aggregator = make(2)
    state = aggregator.init({"kernel": jnp.zeros(3)})
    with pytest.raises(ValueError, match="needs the losses"):
        aggregator.update(gradients, state)
