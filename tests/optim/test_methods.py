"""Every Gramian method: worked numbers, independent references, shared properties."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from mtl_jax import optim
from mtl_jax.optim.cagrad import weights as cagrad_weights
from mtl_jax.optim.mgda import weights as mgda_weights
from mtl_jax.optim.pcgrad import weights as pcgrad_weights
from mtl_jax.optim.sum import weights as sum_weights
from mtl_jax.optim.upgrad import weights as upgrad_weights

# Slow float64 answers from the rows themselves, by other means than the package's.


def pcgrad_reference(rows, orders):
    """The published loop, on gradients instead of coefficients."""
    total = np.zeros(rows.shape[1])
    for task, order in enumerate(orders):
        gradient = rows[task].copy()
        for other in order:
            overlap = gradient @ rows[other]
            if other != task and overlap < 0:
                gradient -= overlap / (rows[other] @ rows[other]) * rows[other]
        total += gradient
    return total


def mgda_reference(rows):
    """Shortest convex combination: nearest of all affine hulls that contain theirs."""
    num_tasks = len(rows)
    if num_tasks > 8:
        return _least_distance(rows)
    best = None
    for size in range(1, num_tasks + 1):
        for support in itertools.combinations(range(num_tasks), size):
            base, *others = rows[list(support)]
            edges = np.reshape(others, (size - 1, len(base))) - base
            inner = np.linalg.lstsq(edges.T, -base, rcond=None)[0]
            weights = np.array([1 - inner.sum(), *inner])
            if weights.min() >= -1e-9:
                point = base + inner @ edges
                if best is None or point @ point < best @ best:
                    best = point
    return best


def _least_distance(rows):
    """Shortest convex combination as nonnegative least squares."""
    scale = np.linalg.norm(rows, axis=1).min()
    columns = np.vstack([rows.T / scale, np.ones(len(rows))])
    target = np.append(np.zeros(rows.shape[1]), 1.0)
    # Columns of equal length, as nnls stops at an absolute tolerance.
    lengths = np.linalg.norm(columns, axis=0)
    values = nnls(columns / lengths, target)[0] / lengths
    return values @ rows / values.sum()


def upgrad_reference(rows, regularization=0.0):
    """Mean of the projections onto the dual cone, by Moreau: minus those on the cone.

    The ridge is that of extra coordinates, one a task, dropped afterwards.
    """
    num_tasks = len(rows)
    extra = np.sqrt(regularization * np.sum(rows**2)) * np.eye(num_tasks)
    wide = np.hstack([rows, extra])
    lengths = np.linalg.norm(wide, axis=1)
    unit = wide / np.where(lengths > 0, lengths, 1)[:, None]
    total = np.zeros(rows.shape[1])
    for task in range(num_tasks):
        lift = nnls(unit.T, -unit[task], maxiter=1000)[0]
        projected = lengths[task] * (unit[task] + lift @ unit)
        total += projected[: rows.shape[1]]
    return total / num_tasks


def cagrad_reference(rows, c):
    """Best worst case in the ball, by bisection on its level.

    The shortest correction that lifts every task to a level is a least-distance
    problem; its length grows with the level.
    """
    mean = rows.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    inner = rows @ mean
    lengths = np.linalg.norm(rows, axis=1)

    def correction(level):
        # min |x| with rows x >= level − inner: its dual is nonnegative least squares.
        need = (level - inner) / lengths
        scale = np.abs(need).max()
        unit = rows / lengths[:, None]
        columns = np.vstack([unit.T, need / scale])
        target = np.append(np.zeros(rows.shape[1]), 1.0)
        values = nnls(columns, target, maxiter=10000)[0]
        residual = target - columns @ values
        if residual[-1] < 1e-11:
            return None
        return -residual[:-1] / residual[-1] * scale

    low, high = inner.min(), (inner + radius * lengths).min()
    for _ in range(100):
        level = (low + high) / 2
        x = correction(level)
        if x is None or np.linalg.norm(x) > radius:
            high = level
        else:
            low = level
    x = correction(low)
    return mean + (0 if x is None else x)


class Method(NamedTuple):
    weights: Callable  # (gramian, active, orders) -> weights
    reference: Callable  # (rows, orders) -> direction


METHODS = {
    "sum": Method(
        lambda gramian, active, _: sum_weights(gramian, active),
        lambda rows, _: rows.sum(axis=0),
    ),
    "pcgrad": Method(
        lambda gramian, active, orders: pcgrad_weights(gramian, orders, active),
        pcgrad_reference,
    ),
    "mgda": Method(
        lambda gramian, active, _: mgda_weights(gramian, active),
        lambda rows, _: mgda_reference(rows),
    ),
    "cagrad": Method(
        lambda gramian, active, _: cagrad_weights(gramian, active, c=0.4),
        lambda rows, _: cagrad_reference(rows, 0.4),
    ),
    "upgrad": Method(
        lambda gramian, active, _: upgrad_weights(gramian, active),
        lambda rows, _: upgrad_reference(rows),
    ),
}
every_method = pytest.mark.parametrize("name", METHODS)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@functools.cache
def jitted(name):
    return jax.jit(METHODS[name].weights)


def make_orders(num_tasks):
    rng = np.random.default_rng(num_tasks)
    return np.array([rng.permutation(num_tasks) for _ in range(num_tasks)])


def make_rows(num_tasks, num_params, ratio=1.0, seed=0):
    """Random rows whose norms spread evenly over a ratio, in random order."""
    rng = np.random.default_rng([seed, num_tasks, num_params])
    rows = rng.normal(size=(num_tasks, num_params))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * rng.permutation(np.geomspace(1, ratio, num_tasks))[:, None]


def solve(name, rows, active=None, orders=None, dtype=np.float32):
    """Weights and direction from the Gramian of the rows, in float64 for comparison."""
    num_tasks = len(rows)
    active = np.ones(num_tasks, bool) if active is None else np.asarray(active)
    orders = make_orders(num_tasks) if orders is None else orders
    wide = dtype == np.float64
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        gramian = jnp.asarray((rows @ rows.T).astype(dtype))
        result = jitted(name)(gramian, jnp.asarray(active), jnp.asarray(orders))
        assert result.dtype == dtype
        weights = np.asarray(result, np.float64)
    return weights, weights @ rows


def assert_same_direction(result, expected, rows, dtype):
    """Relative to the direction, or to the rows where it all but vanishes."""
    relative, floor = (1e-4, 1e-6) if dtype == np.float32 else (1e-8, 1e-12)
    rms = np.sqrt(np.mean(np.sum(rows**2, axis=1)))
    small = min(rms, np.linalg.norm(rows, axis=1).min() * 100)
    error = np.linalg.norm(result - expected)
    assert error <= relative * np.linalg.norm(expected) + floor * small


# Worked by hand or checked against it in the project's method notes: the first pair has
# G = [[18, -22], [-22, 38]], the second [[1, -1], [-1, 2]]. PCGrad: 1 + 22/18 and
# 1 + 22/38. MGDA: w_1 = (38 + 22) / (18 + 38 + 44). UPGrad: half of PCGrad's.
PAIRS = {
    "slanted": np.array([[-4.0, 1, 1], [6, 1, 1]]),
    "plane": np.array([[1.0, 0], [-1, 1]]),
}
WORKED = [
    ("sum", "slanted", (1, 1), (2, 2, 2)),
    ("pcgrad", "slanted", (2.222222, 1.578947), (0.584795, 3.801170, 3.801170)),
    ("mgda", "slanted", (0.6, 0.4), (0, 1, 1)),
    ("cagrad", "slanted", (0.663299, 0.5), (0.346803, 1.163299, 1.163299)),
    ("upgrad", "slanted", (1.111111, 0.789474), (0.292398, 1.900585, 1.900585)),
    ("sum", "plane", (1, 1), (0, 1)),
    ("pcgrad", "plane", (2, 1.5), (0.5, 1.5)),
    ("mgda", "plane", (0.6, 0.4), (0.2, 0.4)),
    ("cagrad", "plane", (0.7, 0.5), (0.2, 0.5)),
    ("upgrad", "plane", (1, 0.75), (0.25, 0.75)),
]


@every_dtype
@pytest.mark.parametrize(("name", "pair", "weights", "direction"), WORKED)
def test_worked_numbers(name, pair, weights, direction, dtype):
    result = solve(name, PAIRS[pair], dtype=dtype)
    np.testing.assert_allclose(result[0], weights, atol=1e-6)
    np.testing.assert_allclose(result[1], direction, atol=4e-6)


@pytest.mark.parametrize(
    ("pair", "c", "weights"),
    [
        ("slanted", 0.0, (0.5, 0.5)),
        ("slanted", 0.5, (0.704124, 0.5)),
        ("slanted", 0.9, (1.107346, 0.738231)),
        ("plane", 0.5, (0.75, 0.5)),
    ],
)
def test_cagrad_worked_radii(pair, c, weights):
    rows = PAIRS[pair].astype(np.float32)
    gramian = jnp.asarray(rows @ rows.T)
    np.testing.assert_allclose(cagrad_weights(gramian, c=c), weights, atol=2e-6)
    rescaled = cagrad_weights(gramian, c=c, rescale=True)
    np.testing.assert_allclose(rescaled * (1 + c**2), weights, atol=2e-6)


def test_upgrad_worked_regularization():
    rows = PAIRS["slanted"].astype(np.float32)
    result = upgrad_weights(jnp.asarray(rows @ rows.T), regularization=1e-4)
    np.testing.assert_allclose(result, (1.110921, 0.789431), atol=1e-6)


def test_upgrad_regularization_matches_reference():
    rows = make_rows(5, 3, ratio=10)
    gramian = jnp.asarray(rows @ rows.T, jnp.float32)
    result = upgrad_weights(gramian, regularization=0.01)
    expected = upgrad_reference(rows, regularization=0.01)
    assert_same_direction(np.asarray(result) @ rows, expected, rows, np.float32)


def test_pcgrad_follows_its_order():
    # Opposite orders give unlike results, each that of the published loop.
    rows = make_rows(4, 3, seed=3)
    orders = make_orders(4)
    directions = []
    for order in (orders, orders[:, ::-1]):
        _, direction = solve("pcgrad", rows, orders=order)
        expected = pcgrad_reference(rows, order)
        assert_same_direction(direction, expected, rows, np.float32)
        directions.append(direction)
    assert np.linalg.norm(directions[0] - directions[1]) > 1e-2


@every_dtype
@every_method
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 12, 40])
def test_matches_reference(name, num_tasks, dtype):
    orders = make_orders(num_tasks)
    for num_params in (2 * num_tasks, num_tasks + 2, max(2, num_tasks // 2)):
        for ratio in (1, 1e4):
            rows = make_rows(num_tasks, num_params, ratio)
            _, direction = solve(name, rows, orders=orders, dtype=dtype)
            expected = METHODS[name].reference(rows, orders)
            rms = np.sqrt(np.mean(np.sum(rows**2, axis=1)))
            error = np.linalg.norm(direction - expected)
            tolerance = 1e-4 if dtype == np.float32 else 1e-8
            assert error <= tolerance * rms
            if num_params > num_tasks:
                # The direction does not vanish: it is right in its own measure too.
                assert error <= 10 * tolerance * np.linalg.norm(expected)


@every_dtype
@every_method
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_scale_law(name, scale, dtype):
    rows = make_rows(5, 8, ratio=1e4)
    _, direction = solve(name, rows, dtype=dtype)
    _, scaled = solve(name, scale * rows, dtype=dtype)
    assert_same_direction(scaled / scale, direction, rows, dtype)


@every_dtype
@every_method
@pytest.mark.parametrize("num_tasks", [5, 12])
def test_permutation_equivariance(name, num_tasks, dtype):
    rows, orders = make_rows(num_tasks, 20, ratio=10), make_orders(num_tasks)
    permutation = np.random.default_rng(0).permutation(num_tasks)
    # Task permutation[i] becomes task i, in the orders as well.
    renamed = np.argsort(permutation)[orders[permutation]]
    weights, _ = solve(name, rows, orders=orders, dtype=dtype)
    permuted, _ = solve(name, rows[permutation], orders=renamed, dtype=dtype)
    tolerance = 1e-4 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(
        permuted, weights[permutation], rtol=tolerance, atol=1e-5
    )


@every_dtype
@every_method
@pytest.mark.parametrize("active", [(1, 0, 1, 1, 0), (0, 0, 0, 1, 0)])
def test_inactive_tasks_are_absent(name, active, dtype):
    active = np.array(active, bool)
    rows = make_rows(5, 4, ratio=10)
    orders = make_orders(5)
    kept = np.flatnonzero(active)
    fewer = np.array(
        [[np.searchsorted(kept, j) for j in orders[i] if active[j]] for i in kept]
    )
    weights, direction = solve(name, rows, active, orders, dtype)
    np.testing.assert_array_equal(weights[~active], 0)
    _, expected = solve(name, rows[active], orders=fewer, dtype=dtype)
    assert_same_direction(direction, expected, rows, dtype)
    if len(kept) == 1:
        # The worst case of one task is its own: CAGrad walks to the edge of its ball.
        alone = 1.4 if name == "cagrad" else 1
        np.testing.assert_allclose(weights[active], alone, rtol=1e-5)


@every_method
def test_no_active_task_gives_zero(name):
    weights, _ = solve(name, make_rows(3, 4), active=[False] * 3)
    np.testing.assert_array_equal(weights, 0)


@every_method
@pytest.mark.parametrize("num_tasks", [8, 12])
def test_aggregator_equals_gramian_path(name, num_tasks):
    rows = make_rows(num_tasks, 12, ratio=10).astype(np.float32)
    gradients = {
        "kernel": jnp.asarray(rows[:, :10].reshape(num_tasks, 5, 2)),
        "bias": jnp.asarray(rows[:, 10:]),
    }
    aggregator = getattr(optim, name)(num_tasks)
    state = aggregator.init(jax.tree.map(lambda leaf: leaf[0], gradients))
    if name == "pcgrad":
        # The state's key decides the orders; the update must equal them all the same.
        _, subkey = jax.random.split(state.key)
        orders = jnp.argsort(jax.random.uniform(subkey, (num_tasks,) * 2), axis=-1)
    else:
        orders = make_orders(num_tasks)
    update, state = jax.jit(aggregator.update)(gradients, state)
    flat = np.concatenate([np.ravel(update["kernel"]), np.ravel(update["bias"])])
    expected = METHODS[name].reference(rows.astype(np.float64), np.asarray(orders))
    assert_same_direction(flat, expected, rows, np.float32)
    np.testing.assert_allclose(state.weights @ rows, flat, atol=1e-5)


G = np.array([3.0, 4.0, 0.0])
H = np.array([0.0, 0.0, 2.0])
ZERO = np.zeros(3)
# Expected directions, from each method's definition. MGDA vanishes where zero is in the
# hull. PCGrad and UPGrad project opposite rows to zero and leave h alone. CAGrad: the
# mean of [g, -g] is zero; that of [g, -3g] is -g, and the best worst case in the ball
# of radius 0.4 |g| is -0.6 g; beside a zero row, or with h beside opposite rows, the
# mean hurts nobody and nothing can improve the worst case, 0.
EDGE_CASES = {
    "all zero": ([ZERO, ZERO], dict.fromkeys(METHODS, ZERO)),
    "one zero": (
        [G, ZERO],
        {"sum": G, "pcgrad": G, "mgda": ZERO, "cagrad": G / 2, "upgrad": G / 2},
    ),
    "duplicates": (
        [G, G],
        {"sum": 2 * G, "pcgrad": 2 * G, "mgda": G, "cagrad": 1.4 * G, "upgrad": G},
    ),
    "opposite": ([G, -G], dict.fromkeys(METHODS, ZERO)),
    "opposite, unequal": (
        [G, -3 * G],
        {
            "sum": -2 * G,
            "pcgrad": ZERO,
            "mgda": ZERO,
            "cagrad": -0.6 * G,
            "upgrad": ZERO,
        },
    ),
    "opposite beside another": (
        [G, -G, H],
        {"sum": H, "pcgrad": H, "mgda": ZERO, "cagrad": H / 3, "upgrad": H / 3},
    ),
    "single": (
        [G],
        {"sum": G, "pcgrad": G, "mgda": G, "cagrad": 1.4 * G, "upgrad": G},
    ),
}


@every_dtype
@every_method
@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_cases(name, case, dtype):
    rows, expected = np.array(EDGE_CASES[case][0]), EDGE_CASES[case][1]
    weights, direction = solve(name, rows, dtype=dtype)
    assert np.all(np.isfinite(weights))
    # A Gramian knows lengths to the root of its precision only.
    tolerance = 5e-3 if dtype == np.float32 else 1e-6
    if name in expected:
        np.testing.assert_allclose(direction, expected[name], atol=tolerance)


@every_dtype
@every_method
@pytest.mark.parametrize("num_tasks", [8, 12, 40])
def test_degenerate_stacks_stay_finite(name, num_tasks, dtype):
    rng = np.random.default_rng(num_tasks)
    rows = rng.normal(size=(num_tasks, 2))
    rows[1], rows[2], rows[3], rows[4] = rows[0], -rows[0], 1e4 * rows[0], 0
    weights, direction = solve(name, rows, dtype=dtype)
    assert np.all(np.isfinite(weights))
    assert np.linalg.norm(direction) <= 2 * num_tasks * np.linalg.norm(rows)
    if name in ("mgda", "upgrad"):
        lengths = np.linalg.norm(rows, axis=1)
        tolerance = (1e-3 if dtype == np.float32 else 1e-7) * lengths.max()
        assert np.all(rows @ direction >= -tolerance * lengths)


@every_dtype
@pytest.mark.parametrize("num_tasks", [3, 8, 12])
def test_guarantees_on_conflicting_tasks(num_tasks, dtype):
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    for seed in range(3):
        rows = make_rows(num_tasks, num_tasks + 1, ratio=100, seed=seed)
        lengths = np.linalg.norm(rows, axis=1)
        for name in ("mgda", "upgrad"):
            _, direction = solve(name, rows, dtype=dtype)
            length = np.linalg.norm(direction)
            least = length**2 if name == "mgda" else 0
            assert np.all(rows @ direction >= least - tolerance * lengths * length)
        mean = rows.mean(axis=0)
        _, direction = solve("cagrad", rows, dtype=dtype)
        np.testing.assert_allclose(
            np.linalg.norm(direction - mean), 0.4 * np.linalg.norm(mean), rtol=1e-5
        )
        assert (rows @ direction).min() >= (rows @ mean).min()


@every_dtype
def test_agreeing_tasks_keep_their_mean_or_sum(dtype):
    rows = np.abs(make_rows(4, 6))
    np.testing.assert_allclose(solve("upgrad", rows, dtype=dtype)[0], 0.25, rtol=1e-5)
    np.testing.assert_allclose(solve("pcgrad", rows, dtype=dtype)[0], 1, rtol=1e-5)
