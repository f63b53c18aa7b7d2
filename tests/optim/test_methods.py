"""Every Gramian method: worked numbers, independent references, shared properties."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from gramian_methods import METHODS, PAIRS, Outcomes, make_orders

from mtl_jax.optim.cagrad import weights as cagrad_weights
from mtl_jax.optim.upgrad import weights as upgrad_weights

every_method = pytest.mark.parametrize("name", METHODS)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@functools.cache
def jitted(name):
    return jax.jit(METHODS[name].weights)


def make_inputs(name, num_tasks):
    inputs = METHODS[name].inputs
    return () if inputs is None else (inputs.make(num_tasks),)


def make_rows(num_tasks, num_params, ratio=1.0, seed=0):
    """Random rows whose norms spread evenly over a ratio, in random order."""
    rng = np.random.default_rng([seed, num_tasks, num_params])
    rows = rng.normal(size=(num_tasks, num_params))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * rng.permutation(np.geomspace(1, ratio, num_tasks))[:, None]


def solve(name, rows, active=None, inputs=None, dtype=np.float32):
    """Weights and direction from the Gramian of the rows, in float64 for comparison."""
    num_tasks = len(rows)
    active = np.ones(num_tasks, bool) if active is None else np.asarray(active)
    inputs = make_inputs(name, num_tasks) if inputs is None else inputs
    wide = dtype == np.float64
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        gramian = jnp.asarray((rows @ rows.T).astype(dtype))
        inputs = [
            jnp.asarray(value, dtype if value.dtype == np.float64 else None)
            for value in inputs
        ]
        result = jitted(name)(gramian, jnp.asarray(active), *inputs)
        assert result.dtype == dtype
        weights = np.asarray(result, np.float64)
    return weights, weights @ rows


def natural_lengths(name, rows):
    """Of what order a direction is, by task: the scale law applied to its norm."""
    return np.linalg.norm(rows, axis=1) ** METHODS[name].power


def relative_tolerance(name, dtype):
    return METHODS[name].tolerance if dtype == np.float32 else 1e-8


def assert_same_direction(name, result, expected, rows, dtype):
    """Relative to the direction, or to the rows where it all but vanishes."""
    relative = relative_tolerance(name, dtype)
    floor = relative / 100 if dtype == np.float32 else 1e-12
    lengths = natural_lengths(name, rows)
    small = min(np.sqrt(np.mean(lengths**2)), lengths.min() * 100)
    error = np.linalg.norm(result - expected)
    assert error <= relative * np.linalg.norm(expected) + floor * small


@every_dtype
@every_method
def test_worked_numbers(name, dtype):
    for pair, (weights, direction) in METHODS[name].worked.items():
        result = solve(name, PAIRS[pair], dtype=dtype)
        if weights is not None:
            np.testing.assert_allclose(result[0], weights, atol=1e-6)
        if direction is not None:
            np.testing.assert_allclose(result[1], direction, atol=4e-6)


@every_dtype
@every_method
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 12, 40])
def test_matches_reference(name, num_tasks, dtype):
    inputs = make_inputs(name, num_tasks)
    for num_params in (2 * num_tasks, num_tasks + 2, max(2, num_tasks // 2)):
        for ratio in (1, 1e4):
            rows = make_rows(num_tasks, num_params, ratio)
            _, direction = solve(name, rows, dtype=dtype)
            expected = METHODS[name].reference(rows, *inputs)
            error = np.linalg.norm(direction - expected)
            tolerance = relative_tolerance(name, dtype)
            assert error <= tolerance * np.sqrt(
                np.mean(natural_lengths(name, rows) ** 2)
            )
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
    scaled /= scale ** METHODS[name].power
    assert_same_direction(name, scaled, direction, rows, dtype)


@every_dtype
@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].equivariant])
@pytest.mark.parametrize("num_tasks", [5, 12])
def test_permutation_equivariance(name, num_tasks, dtype):
    rows, inputs = make_rows(num_tasks, 20, ratio=10), make_inputs(name, num_tasks)
    permutation = np.random.default_rng(0).permutation(num_tasks)
    # Task permutation[i] becomes task i, in the inputs as well.
    renamed = [METHODS[name].inputs.permute(value, permutation) for value in inputs]
    weights, _ = solve(name, rows, dtype=dtype)
    permuted, _ = solve(name, rows[permutation], inputs=renamed, dtype=dtype)
    tolerance = 1e-4 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(
        permuted, weights[permutation], rtol=tolerance, atol=1e-5
    )


@every_dtype
@every_method
@pytest.mark.parametrize("active", [(1, 0, 1, 1, 0), (0, 0, 0, 1, 0)])
def test_inactive_tasks_are_absent(name, active, dtype):
    active = np.array(active, bool)
    rows, method = make_rows(5, 4, ratio=10), METHODS[name]
    fewer = [method.inputs.keep(value, active) for value in make_inputs(name, 5)]
    weights, direction = solve(name, rows, active, dtype=dtype)
    np.testing.assert_array_equal(weights[~active], 0)
    _, expected = solve(name, rows[active], inputs=fewer, dtype=dtype)
    assert_same_direction(name, direction, expected, rows[active], dtype)
    if active.sum() == 1 and method.outcomes is not None:
        length = np.linalg.norm(rows[active])
        alone = method.outcomes.single * (length / 5) ** (method.power - 1)
        np.testing.assert_allclose(weights[active], alone, rtol=1e-5)


@every_method
def test_no_active_task_gives_zero(name):
    weights, _ = solve(name, make_rows(3, 4), active=[False] * 3)
    np.testing.assert_array_equal(weights, 0)


@every_method
@pytest.mark.parametrize("num_tasks", [8, 12])
def test_aggregator_equals_gramian_path(name, num_tasks):
    method = METHODS[name]
    rows = make_rows(num_tasks, 14, ratio=10).astype(np.float32)
    gradients = {
        "kernel": jnp.asarray(rows[:, :10].reshape(num_tasks, 5, 2)),
        "bias": jnp.asarray(rows[:, 10:]),
    }
    aggregator = method.make(num_tasks)
    state = aggregator.init(jax.tree.map(lambda leaf: leaf[0], gradients))
    inputs = []
    if method.inputs is not None and state.key is not None:
        # The state's key decides; the update must equal the reference all the same.
        _, subkey = jax.random.split(state.key)
        inputs = [np.asarray(method.inputs.from_key(subkey, num_tasks))]
    elif method.inputs is not None:
        inputs = make_inputs(name, num_tasks)
    update, state = jax.jit(aggregator.update)(gradients, state)
    flat = np.concatenate([np.ravel(update["kernel"]), np.ravel(update["bias"])])
    expected = method.reference(rows.astype(np.float64), *inputs)
    assert_same_direction(name, flat, expected, rows, np.float32)
    np.testing.assert_allclose(state.weights @ rows, flat, atol=1e-5)


G = np.array([3.0, 4.0, 0.0])
H = np.array([0.0, 0.0, 2.0])
CASES = Outcomes(
    all_zero=[0 * G, 0 * G],
    one_zero=[G, 0 * G],
    duplicates=[G, G],
    opposite=[G, -G],
    unequal=[G, -3 * G],
    beside=[G, -G, H],
    single=[G],
)


@every_dtype
@every_method
@pytest.mark.parametrize("case", Outcomes._fields)
def test_degenerate_gradients(name, case, dtype):
    rows, outcomes = np.array(getattr(CASES, case)), METHODS[name].outcomes
    weights, direction = solve(name, rows, dtype=dtype)
    assert np.all(np.isfinite(weights))
    if outcomes is None:
        expected = METHODS[name].reference(rows, *make_inputs(name, len(rows)))
    elif case == "beside":
        expected = outcomes.beside @ np.array([G, H])
    else:
        expected = getattr(outcomes, case) * G
    # A Gramian knows lengths to the root of its precision only.
    tolerance = 5e-3 if dtype == np.float32 else 1e-6
    np.testing.assert_allclose(direction, expected, atol=tolerance)


@every_dtype
@every_method
@pytest.mark.parametrize("num_tasks", [8, 12, 40])
def test_degenerate_stacks_stay_finite(name, num_tasks, dtype):
    rng = np.random.default_rng(num_tasks)
    rows = rng.normal(size=(num_tasks, 2))
    rows[1], rows[2], rows[3], rows[4] = rows[0], -rows[0], 1e4 * rows[0], 0
    weights, direction = solve(name, rows, dtype=dtype)
    assert np.all(np.isfinite(weights))
    lengths = np.linalg.norm(rows, axis=1)
    natural = natural_lengths(name, rows[lengths > 0])
    assert np.linalg.norm(direction) <= 2 * num_tasks * np.linalg.norm(natural)
    if METHODS[name].never_conflicts:
        tolerance = (1e-3 if dtype == np.float32 else 1e-7) * natural.max()
        assert np.all(rows @ direction >= -tolerance * lengths)


@every_dtype
@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].guarantee])
@pytest.mark.parametrize("num_tasks", [3, 8, 12])
def test_guarantee(name, num_tasks, dtype):
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    for seed in range(3):
        rows = make_rows(num_tasks, num_tasks + 1, ratio=100, seed=seed)
        weights, direction = solve(name, rows, dtype=dtype)
        margins = METHODS[name].guarantee(rows, weights, direction)
        assert np.min(margins) >= -tolerance


@every_dtype
def test_agreeing_tasks_keep_their_mean_or_sum(dtype):
    rows = np.abs(make_rows(4, 6))
    np.testing.assert_allclose(solve("upgrad", rows, dtype=dtype)[0], 0.25, rtol=1e-5)
    np.testing.assert_allclose(solve("pcgrad", rows, dtype=dtype)[0], 1, rtol=1e-5)


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
    expected = references.upgrad(rows, regularization=0.01)
    direction = np.asarray(result) @ rows
    assert_same_direction("upgrad", direction, expected, rows, np.float32)


def test_pcgrad_follows_its_order():
    # Opposite orders give unlike results, each that of the published loop.
    rows = make_rows(4, 3, seed=3)
    orders = make_orders(4)
    directions = []
    for order in (orders, orders[:, ::-1]):
        _, direction = solve("pcgrad", rows, inputs=[order])
        expected = references.pcgrad(rows, order)
        assert_same_direction("pcgrad", direction, expected, rows, np.float32)
        directions.append(direction)
    assert np.linalg.norm(directions[0] - directions[1]) > 1e-2


@pytest.mark.parametrize("seed", range(1, 31))
def test_pcd_gives_up_needs_that_contradict(seed):
    # Most draws of five directions in a plane leave none that helps all of them.
    rows = make_rows(5, 2, ratio=1e4, seed=seed)
    _, direction = solve("pcd", rows, dtype=np.float64)
    expected = references.pcd(rows, *make_inputs("pcd", 5))
    assert np.linalg.norm(direction - expected) <= 1e-8 * np.linalg.norm(expected)
