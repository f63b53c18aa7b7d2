"""Methods that learn from step to step, against the published loops on whole rows."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from gramian_methods import make_orders
from published_loops import LOOPS, nearest_on_simplex

from mtl_jax import optim
from mtl_jax.optim.gradvac import weights as gradvac_weights
from mtl_jax.optim.simplex import project_simplex

NUM_TASKS, NUM_PARAMS = 5, 9

every_method = pytest.mark.parametrize("name", LOOPS)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
MASKS = [(1, 1, 1, 1, 1), (1, 1, 0, 1, 1), (0, 1, 1, 0, 1), (1, 0, 0, 0, 0)]


def precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def make_steps(num_steps, noise=0.4, ratio=3.0, seed=0):
    """Gradients of three batches a step, alike from step to step, and losses."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(NUM_TASKS, NUM_PARAMS))
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    lengths = rng.permutation(np.geomspace(1, ratio, NUM_TASKS))[:, None]
    for _ in range(num_steps):
        moves = rng.normal(size=(3, *base.shape)) * noise / np.sqrt(NUM_PARAMS)
        yield lengths * (base + moves), rng.uniform(0.5, 2, NUM_TASKS)


def as_tree(rows, dtype):
    rows = jnp.asarray(rows, dtype)
    return {"kernel": rows[:, :8].reshape(len(rows), 4, 2), "bias": rows[:, 8:]}


def as_row(gradient):
    return np.concatenate([np.ravel(gradient["kernel"]), np.ravel(gradient["bias"])])


@functools.cache
def compiled(make, num_tasks, **hyperparameters):
    return jax.jit(make(num_tasks, **hyperparameters).update)


def initial_state(aggregator, dtype=np.float32):
    return aggregator.init(as_tree(np.zeros((1, NUM_PARAMS)), dtype))


def advance(update, state, batches, losses, active=None, dtype=np.float32):
    """One update, and the row in which task `i` of a random method met the others."""
    first, second, third = (as_tree(rows, dtype) for rows in batches)
    num_tasks = len(losses)
    orders = None
    if state.key is not None:
        subkey = jax.random.split(state.key)[1]
        orders = jax.random.uniform(subkey, (num_tasks, num_tasks)).argsort(axis=-1)
    active = np.ones(num_tasks) if active is None else active
    gradient, state = update(
        first,
        state,
        losses=jnp.asarray(losses, dtype),
        active=jnp.asarray(active, bool),
        second=second,
        third=third,
    )
    return as_row(gradient), state, orders


def error_against(result, expected, batches):
    rms = np.sqrt(np.mean(np.sum(batches[0] ** 2, axis=1)))
    return np.linalg.norm(result - expected) / rms


@every_dtype
@every_method
@pytest.mark.parametrize("masks", [MASKS[:1], MASKS])
def test_sequence_follows_the_published_loop(name, masks, dtype):
    with precision(dtype):
        aggregator, loop = getattr(optim, name)(NUM_TASKS), LOOPS[name](NUM_TASKS)
        chex.clear_trace_counter()
        update = jax.jit(chex.assert_max_traces(aggregator.update, n=1))
        state = initial_state(aggregator, dtype)
        types = jax.tree.map(lambda leaf: leaf.dtype, state)
        moved = []
        for step, (batches, losses) in enumerate(make_steps(8)):
            active = masks[step % len(masks)]
            result, state, orders = advance(
                update, state, batches, losses, active, dtype
            )
            kept = np.flatnonzero(active).tolist()
            orders = None if orders is None else np.asarray(orders)
            expected = loop(batches, losses, orders, kept)
            tolerance = 2e-5 if dtype == np.float32 else 1e-8
            assert error_against(result, expected, batches) < tolerance
            np.testing.assert_array_equal(state.weights[~np.array(active, bool)], 0)
            moved.append(np.asarray(state.weights))
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == types
        assert state.weights.dtype == dtype
        # The test would say little of a method that did nothing.
        assert np.std(moved, axis=0).max() > 1e-2


def on_host(state):
    """The state as a checkpoint has it, in NumPy arrays."""
    key = None if state.key is None else jax.random.key_data(state.key)
    return jax.tree.map(np.array, state._replace(key=key))


def from_host(state):
    state = jax.tree.map(jnp.asarray, state)
    key = None if state.key is None else jax.random.wrap_key_data(state.key)
    return state._replace(key=key)


def run(name, steps, num_tasks=NUM_TASKS, state=None, **hyperparameters):
    """Directions of a sequence in float32, and the state after it."""
    aggregator = getattr(optim, name)(num_tasks, **hyperparameters)
    update = compiled(getattr(optim, name), num_tasks, **hyperparameters)
    state = initial_state(aggregator) if state is None else state
    directions = []
    for batches, losses in steps:
        direction, state, _ = advance(update, state, batches, losses)
        directions.append(direction.astype(np.float64))
    return np.array(directions), state


# What to change so that scaled gradients give the scaled direction: MoDo, as published,
# has a learning rate in units of the inverse squared gradient.
@every_method
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_law(name, scale):
    changed = {}
    if name == "modo":
        changed = {"learning_rate": 0.1 / scale**2, "regularization": 0.1 * scale**2}
    steps = list(make_steps(4, ratio=1e4))
    directions, _ = run(name, steps)
    scaled_steps = [(scale * batches, losses) for batches, losses in steps]
    scaled, _ = run(name, scaled_steps, **changed)
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    np.testing.assert_allclose(
        scaled / scale / lengths, directions / lengths, atol=1e-4
    )


@pytest.mark.parametrize("name", ["pcd", "modo", "sdmgrad", "gradnorm"])
def test_permutation_renames_the_tasks(name):
    permutation = np.array([3, 0, 4, 1, 2])
    steps = list(make_steps(4))
    renamed = [
        (batches[:, permutation], losses[permutation]) for batches, losses in steps
    ]
    primary = {"primary": 2} if name == "pcd" else {}
    moved = {"primary": 4} if name == "pcd" else {}  # Task 2 becomes task 4.
    directions, state = run(name, steps, **primary)
    others, other_state = run(name, renamed, **moved)
    np.testing.assert_allclose(others, directions, atol=1e-5)
    np.testing.assert_allclose(
        other_state.weights, state.weights[permutation], atol=1e-5
    )


def test_permutation_renames_the_tasks_of_gradvac():
    (batches, _), *_ = make_steps(1)
    permutation, orders = np.array([3, 0, 4, 1, 2]), make_orders(NUM_TASKS)
    targets = np.linspace(-0.9, 0.9, NUM_TASKS**2).reshape(NUM_TASKS, NUM_TASKS)

    def weigh(rows, orders, targets):
        matrix = jnp.asarray(rows @ rows.T, np.float32)
        return gradvac_weights(matrix, orders, jnp.asarray(targets, np.float32))

    weights, after = weigh(batches[0], orders, targets)
    square = np.ix_(permutation, permutation)
    other_weights, other_after = weigh(
        batches[0][permutation],
        np.argsort(permutation)[orders[permutation]],
        targets[square],
    )
    np.testing.assert_allclose(other_weights, weights[permutation], rtol=1e-4)
    np.testing.assert_allclose(other_after, after[square], atol=1e-5)


@pytest.mark.parametrize("name", ["pcd", "modo", "sdmgrad", "gradnorm"])
def test_tasks_that_never_come_are_absent(name):
    """As in an aggregator of fewer tasks; that of GradVac has other random orders."""
    active, steps = np.array([1, 0, 1, 1, 0], bool), list(make_steps(5))
    fewer = [(batches[:, active], losses[active]) for batches, losses in steps]
    expected, _ = run(name, fewer, 3)
    update = compiled(getattr(optim, name), NUM_TASKS)
    state = initial_state(getattr(optim, name)(NUM_TASKS))
    for (batches, losses), direction in zip(steps, expected, strict=True):
        result, state, _ = advance(update, state, batches, losses, active)
        assert error_against(result, direction, batches) < 1e-5


@every_method
def test_what_an_inactive_task_has_does_not_matter(name):
    active = np.array([1, 0, 1, 1, 0], bool)
    update = compiled(getattr(optim, name), NUM_TASKS)
    state = other = initial_state(getattr(optim, name)(NUM_TASKS))
    for batches, losses in make_steps(3):
        spoiled = np.where(active[:, None], batches, 1e3 * batches[..., ::-1])
        bad_losses = np.where(active, losses, -7)
        result, state, _ = advance(update, state, batches, losses, active)
        other_result, other, _ = advance(update, other, spoiled, bad_losses, active)
        np.testing.assert_array_equal(other_result, result)
    jax.tree.map(np.testing.assert_array_equal, on_host(other), on_host(state))


@every_method
def test_no_active_task_gives_zero_and_changes_nothing(name):
    aggregator = getattr(optim, name)(NUM_TASKS)
    update = compiled(getattr(optim, name), NUM_TASKS)
    (batches, losses), *_ = make_steps(1)
    state = initial_state(aggregator)
    result, after, _ = advance(update, state, batches, losses, np.zeros(NUM_TASKS))
    np.testing.assert_array_equal(result, 0)
    jax.tree.map(np.testing.assert_array_equal, after.memory, state.memory)


@every_method
def test_resuming_gives_the_same_bits(name):
    steps = list(make_steps(6))
    whole, end = run(name, steps)
    _, middle = run(name, steps[:3])
    rest, resumed_end = run(name, steps[3:], state=from_host(on_host(middle)))
    np.testing.assert_array_equal(rest, whole[3:])
    jax.tree.map(np.testing.assert_array_equal, on_host(resumed_end), on_host(end))
    # The state matters: a fresh one gives something else.
    fresh, _ = run(name, steps[3:])
    assert np.abs(fresh - rest).max() > 1e-5


G = np.array([3.0, 4, 0, 0, 0, 0, 0, 0, 0])
H = np.array([0.0, 0, 2, 0, 0, 0, 0, 0, 0])
# Multiples of (g, h) after three steps of the same gradients and losses. GradVac skips
# zero rows, cancels opposite ones, which leaves no row and no cosine, and counts
# duplicates. PCD follows the first, which the second outvotes where opposite. MoDo goes
# to the zero row at once, as 0.1 |g|² / 2 > 1, and its pull towards equal parts brings
# it back to 0.005 and then to 0.0037. SDMGrad with ρ = 0.3 and K tasks leaves the one
# that loses ρ / K / (1 + ρ), and the mean of what nothing tells apart. GradNorm's
# weights stay 1 where lengths agree.
LOW = 0.15 / 1.3
DEGENERATE = {
    "all zero": ([0 * G, 0 * G], dict.fromkeys(LOOPS, (0, 0))),
    "one zero": (
        [G, 0 * G],
        {"gradvac": (1, 0), "pcd": (1, 0), "modo": (0.0037, 0), "sdmgrad": (LOW, 0)},
    ),
    "duplicates": (
        [G, G],
        {
            "gradvac": (2, 0),
            "pcd": (1, 0),
            "modo": (1, 0),
            "sdmgrad": (1, 0),
            "gradnorm": (2, 0),
        },
    ),
    "opposite": (
        [G, -G],
        {
            "gradvac": (0, 0),
            "pcd": (-1, 0),
            "modo": (0, 0),
            "sdmgrad": (0, 0),
            "gradnorm": (0, 0),
        },
    ),
    "opposite, unequal": ([G, -3 * G], {"gradvac": (0, 0), "pcd": (-1, 0)}),
    "opposite beside another": (
        [G, -G, H],
        {
            "gradvac": (0, 1),
            "pcd": (-np.sqrt(0.5), np.sqrt(3.125)),
            "sdmgrad": (0, 0.1 / 1.3),
        },
    ),
    "helped by none": ([H, G, -G], {"gradvac": (0, 1), "pcd": (0, 1)}),
    "single": ([G], dict.fromkeys(LOOPS, (1, 0))),
}


@every_method
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_gradients(name, case):
    rows, expected = np.array(DEGENERATE[case][0]), DEGENERATE[case][1]
    steps = [(np.stack([rows] * 3), np.ones(len(rows)))] * 3
    directions, state = run(name, steps, len(rows))
    for leaf in jax.tree.leaves(on_host(state)):
        assert np.all(np.isfinite(leaf))
    assert np.all(np.isfinite(directions))
    if name in expected:
        wanted = expected[name] @ np.array([G, H])
        # A Gramian knows lengths to the root of its precision only.
        np.testing.assert_allclose(directions[-1], wanted, atol=5e-3)


@every_method
@pytest.mark.parametrize("num_tasks", [12, 40])
def test_many_degenerate_tasks_stay_finite(name, num_tasks):
    rng = np.random.default_rng(num_tasks)
    aggregator = getattr(optim, name)(num_tasks)
    update, state = compiled(getattr(optim, name), num_tasks), initial_state(aggregator)
    for _ in range(4):
        rows = np.zeros((3, num_tasks, NUM_PARAMS))
        rows[..., :2] = rng.normal(size=(3, num_tasks, 2))
        rows[:, 1], rows[:, 2], rows[:, 3] = rows[:, 0], -rows[:, 0], 1e4 * rows[:, 0]
        rows[:, 4] = 0
        losses = np.where(np.arange(num_tasks) == 5, 0, rng.uniform(size=num_tasks))
        direction, state, _ = advance(update, state, rows, losses)
        assert np.all(np.isfinite(direction))
        assert np.all(np.isfinite(state.weights))


def test_gradnorm_worked_first_step():
    # |g| = (√18, √38): the first is shorter than the mean and gains. The weights are
    # 2 exp(±0.025) / (exp(0.025) + exp(−0.025)) = 1 ± tanh(0.025).
    rows = np.zeros((3, 2, NUM_PARAMS))
    rows[:, :, :3] = [[-4, 1, 1], [6, 1, 1]]
    directions, state = run("gradnorm", [(rows, np.ones(2))], 2)
    np.testing.assert_allclose(directions[0][:3], [2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(
        state.memory.multipliers, [1.024995, 0.975005], atol=1e-6
    )


def test_gradnorm_makes_lengths_equal_and_those_of_slow_tasks_longer():
    rows = np.zeros((3, 2, NUM_PARAMS))
    rows[:, 0, 0], rows[:, 1, 1] = 1, 1e4
    _, state = run("gradnorm", [(rows, np.array([2.0, 0.5]))] * 250, 2)
    lengths = state.weights * np.array([1, 1e4])
    np.testing.assert_allclose(lengths, lengths.mean(), rtol=0.03)
    # Now the first has 0.9 of its loss left and the second 0.6, of 0.75 in the mean:
    # the second is to have 0.8^1.5 = 0.716 of the mean length, the first the rest.
    _, state = run("gradnorm", [(rows, np.array([1.8, 0.3]))] * 250, 2, state)
    lengths = state.weights * np.array([1, 1e4])
    np.testing.assert_allclose(lengths / lengths.mean(), [1.284, 0.716], rtol=0.03)


def test_sdmgrad_finds_the_min_norm_point_where_the_authors_rate_does_not():
    # With one batch for all, d (1 + ρ) is the shortest convex combination of the
    # gradients moved by ρ times their mean.
    reached = {}
    for rate in (0.3, 10.0):
        excess = []
        for seed in range(5):
            (batches, losses), *_ = make_steps(1, ratio=1, seed=seed)
            rows = batches[0]
            directions, _ = run(
                "sdmgrad", [(np.stack([rows] * 3), losses)] * 5, learning_rate=rate
            )
            shortest = references.mgda(rows + 0.3 * rows.mean(axis=0)) / 1.3
            length = np.linalg.norm(directions[-1])
            excess.append(length / np.linalg.norm(shortest) - 1)
        reached[rate] = excess
    assert max(reached[0.3]) < 1e-5
    assert min(reached[10.0]) > 0.1


def test_modo_drifts_to_the_min_norm_weights():
    (batches, losses), *_ = make_steps(1, ratio=2)
    rows = np.stack([batches[0]] * 3)
    hyperparameters = {"learning_rate": 0.05, "regularization": 0.0}
    directions, _ = run("modo", [(rows, losses)] * 300, **hyperparameters)
    expected = references.mgda(batches[0])
    assert error_against(directions[-1], expected, batches) < 1e-4
    assert error_against(directions[0], expected, batches) > 1e-2


def test_cross_gramian_of_two_batches_matches_flat_rows():
    (batches, _), *_ = make_steps(1)
    first, second, _ = (as_tree(rows, np.float32) for rows in batches)
    matrix = optim.cross_gramian(first, second)
    np.testing.assert_allclose(matrix, batches[0] @ batches[1].T, atol=1e-5)
    np.testing.assert_array_equal(
        optim.cross_gramian(first, first), optim.gramian(first)
    )
    with pytest.raises(ValueError, match=r"mismatch|structure error"):
        optim.cross_gramian(first, {"kernel": second["kernel"]})
    # 4096 products of 1: a bfloat16 sum would stop at 256.
    ones = {"kernel": jnp.ones((2, 64, 64), jnp.bfloat16)}
    matrix = optim.cross_gramian(ones, ones)
    assert matrix.dtype == jnp.float32
    np.testing.assert_array_equal(matrix, np.full((2, 2), 4096))


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_weights_do_not_see_the_batch_they_multiply(name):
    (batches, losses), *_ = make_steps(1)
    other = np.stack([-2 * batches[0], *batches[1:]])
    [direction], _ = run(name, [(batches, losses)])
    [turned], _ = run(name, [(other, losses)])
    np.testing.assert_allclose(turned, -2 * direction, rtol=1e-5)


def test_further_batches_are_split_by_group():
    (batches, _), *_ = make_steps(1)
    first, second, third = (as_tree(rows, np.float32) for rows in batches)
    by_leaf = optim.grouped(optim.modo, NUM_TASKS, r"(.+)")
    state = initial_state(by_leaf)
    gradient, _ = by_leaf.update(first, state, second=second, third=third)
    for leaf in ("kernel", "bias"):
        alone, parts = optim.modo(NUM_TASKS), (first[leaf], second[leaf], third[leaf])
        expected, _ = alone.update(
            parts[0], alone.init(parts[0][0]), second=parts[1], third=parts[2]
        )
        np.testing.assert_allclose(gradient[leaf], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
@pytest.mark.parametrize("missing", ["second", "third"])
def test_missing_batches_are_named(name, missing):
    aggregator = getattr(optim, name)(2)
    gradients = {"kernel": jnp.ones((2, 3))}
    state = aggregator.init({"kernel": jnp.ones(3)})
    batches = {"second": gradients, "third": gradients}
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        aggregator.update(gradients, state, **{**batches, missing: None})
    wrong = {"kernel": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match=rf"{missing}\['kernel'\] has shape"):
        aggregator.update(gradients, state, **{**batches, missing: wrong})


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("gradvac", {"beta": 1.5}),
        ("pcd", {"tau": -0.1}),
        ("pcd", {"beta": 1.0}),
        ("pcd", {"primary": 2}),
        ("modo", {"learning_rate": -1.0}),
        ("modo", {"regularization": -1.0}),
        ("sdmgrad", {"learning_rate": -1.0}),
        ("sdmgrad", {"regularization": -1.0}),
        ("sdmgrad", {"momentum": 1.0}),
        ("sdmgrad", {"num_iterations": 0}),
        ("gradnorm", {"alpha": -1.0}),
        ("gradnorm", {"learning_rate": -1.0}),
    ],
)
def test_bad_hyperparameters_are_named(name, hyperparameters):
    [argument] = hyperparameters
    with pytest.raises(ValueError, match=argument):
        getattr(optim, name)(2, **hyperparameters)


def test_pcd_gives_up_only_what_is_impossible():
    # Two others at an angle of nearly 180 degrees leave a narrow wedge, in which d̂ is
    # long: still met, and every task gains.
    rows = np.zeros((3, NUM_PARAMS))
    rows[0, 0] = 1
    for angle in (1.0, 0.1, 0.01):
        rows[1, :2], rows[2, :2] = [1, angle], [-1, angle]
        [direction], _ = run("pcd", [(np.stack([rows] * 3), np.ones(3))], 3)
        expected = references.pcd(rows)
        assert np.all(rows[1:] @ expected > 0)
        np.testing.assert_allclose(direction, expected, atol=2e-2 * angle)


def test_simplex_projection_is_exact_at_any_scale():
    rng = np.random.default_rng(0)
    project = jax.jit(project_simplex)
    active = jnp.array([1, 1, 0, 1, 1, 1], bool)
    for scale in (1e-6, 1e-2, 1, 1e2, 1e6):
        values = scale * rng.normal(size=6) + rng.normal()
        expected = nearest_on_simplex(values[np.asarray(active)])
        result = np.asarray(project(jnp.asarray(values, np.float32), active))
        assert result[2] == 0
        np.testing.assert_allclose(np.delete(result, 2), expected, atol=1e-6)
    np.testing.assert_array_equal(project(jnp.ones(6), jnp.zeros(6, bool)), 0)
