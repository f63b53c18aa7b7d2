"""Where published reference codes miss the exact answer: docs/reference_codes.md.

Each test works through what a code does in a few lines of NumPy, shows the figure that
this gives, and holds the exact one to a criterion of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from scipy.optimize import least_squares, minimize

from mtl_jax import optim
from mtl_jax.optim.aligned_mtl import weights as aligned_mtl_weights
from mtl_jax.optim.cagrad import weights as cagrad_weights
from mtl_jax.optim.dualproj import weights as dualproj_weights
from mtl_jax.optim.dwa import weights as dwa_weights
from mtl_jax.optim.fairgrad import weights as fairgrad_weights
from mtl_jax.optim.gls import weights as gls_weights
from mtl_jax.optim.imtl_g import weights as imtl_g_weights
from mtl_jax.optim.mgda import weights as mgda_weights
from mtl_jax.optim.nash_mtl import weights as nash_mtl_weights
from mtl_jax.optim.pcgrad import weights as pcgrad_weights
from mtl_jax.optim.upgrad import weights as upgrad_weights

SLANTED = np.array([[-4.0, 1, 1], [6, 1, 1]])
PLANE = np.array([[1.0, 0], [-1, 1]])
G = np.array([3.0, 4, 0])


@functools.cache
def jitted(weigh, **options):
    return jax.jit(functools.partial(weigh, **options))


def solve(weigh, rows, *args, **options):
    """Weights and direction of ours, in float32 as by default."""
    gramian = jnp.asarray(rows @ rows.T, jnp.float32)
    found = jitted(weigh, **options)(gramian, *args)
    assert found.dtype == jnp.float32
    weights = np.asarray(found, np.float64)
    return weights, weights @ rows


def published_nash_mtl(gramian):
    """First step: convex programs with a linearised objective, from weights 1.

    The program is solved for `v = weights * norms`, so that its numbers are of order
    one: what is left of the error is that of the iteration, not of a solver.
    """
    size, norms = np.linalg.norm(gramian), np.sqrt(np.diagonal(gramian))
    matrix, cosines = gramian / size, gramian / np.outer(norms, norms)
    weights = np.ones(len(gramian))
    for _ in range(20):
        with np.errstate(divide="ignore"):
            slope = 1 / weights + (1 / (matrix @ weights)) @ matrix
        if not np.all(np.isfinite(slope)):
            return weights  # The solver refuses, and the weights stay.
        cost = (matrix.sum(axis=0) + slope / size) / norms
        cost /= np.abs(cost).max()
        bargains = {
            "type": "ineq",
            "fun": lambda v: v * (cosines @ v) - 1,
            "jac": lambda v: np.diag(cosines @ v) + v[:, None] * cosines,
        }
        signs = {"type": "ineq", "fun": lambda v: cosines @ v, "jac": lambda v: cosines}
        found = minimize(
            lambda v, cost=cost: cost @ v,
            np.full(len(norms), 3.0),
            jac=lambda v, cost=cost: cost,
            bounds=[(0, None)] * len(norms),
            constraints=[bargains, signs],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        following = found.x / norms
        balanced = np.linalg.norm(matrix @ weights - 1 / weights) < 1e-3
        if balanced or np.linalg.norm(following - weights) < 1e-6:
            return weights
        weights = following
    return weights


@pytest.mark.parametrize(
    ("gramian", "published", "exact"),
    [
        # Where it works: the slanted pair.
        ([[18, -22], [-22, 38]], (0.591461, 0.407071), (0.591461, 0.407071)),
        # The first linearisation divides by G · (1, 1) = (0, 1).
        ([[1, -1], [-1, 2]], (1, 1), (1.847759, 1.306563)),
        # Norms 1 and 100, cosine −1/2: w_k |g_k| = 1 / sqrt(1 − 1/2).
        ([[1, -50], [-50, 1e4]], (14.56, 0.0742), (1.414214, 0.01414214)),
    ],
)
def test_nash_mtl_stops_at_weights_that_are_no_bargain(gramian, published, exact):
    gramian = np.array(gramian, float)
    found = published_nash_mtl(gramian)
    np.testing.assert_allclose(found, published, rtol=5e-4)
    np.testing.assert_allclose(exact * (gramian @ exact), 1, rtol=1e-5)
    weights, _ = solve(nash_mtl_weights, np.linalg.cholesky(gramian))
    np.testing.assert_allclose(weights, exact, rtol=1e-5)


def test_nash_mtl_of_zeros():
    gramian = np.zeros((2, 2))
    with np.errstate(invalid="ignore"):
        assert np.all(np.isnan(gramian / np.linalg.norm(gramian)))
    np.testing.assert_array_equal(solve(nash_mtl_weights, gramian)[0], 0)


@pytest.mark.parametrize(
    ("alpha", "scale", "published", "exact"),
    [
        (1, 1, (1, 1), (1, 1)),
        (1, 1e-3, (0.650, 1), (1, 1)),
        (1, 1e-6, (0.000512, 0.00512), (1, 1)),
        (2, 1e-3, (6.868, 4.642), (10, 4.642)),
        (2, 1e-6, (0.00995, 0.0995), (100, 46.42)),
    ],
)
def test_fairgrad_by_least_squares_in_the_scale_it_comes(
    alpha, scale, published, exact
):
    rows = scale * np.diag([1.0, 10])
    gramian = rows @ rows.T
    found = least_squares(
        lambda w: gramian @ w - (1 / w) ** (1 / alpha),
        np.full(2, 0.5),
        bounds=(0, np.inf),
    ).x
    np.testing.assert_allclose(found @ rows, published, rtol=1e-3)
    weights, direction = solve(fairgrad_weights, rows, alpha=alpha)
    np.testing.assert_allclose(weights * (gramian @ weights) ** alpha, 1, rtol=1e-4)
    np.testing.assert_allclose(direction, exact, rtol=1e-3)


def normalized(gramian):
    """Divided by the trace, or zero where this is below an absolute threshold."""
    trace = np.trace(gramian)
    return np.zeros_like(gramian) if trace < 1e-4 else gramian / trace


def lift(gramian, start):
    """The shortest combination with weights of at least `start`, for two tasks.

    With either weight at its bound, the other minimises a parabola beyond its own.
    """
    points = []
    for fixed, free in ((0, 1), (1, 0)):
        best = -gramian[free, fixed] * start[fixed] / gramian[free, free]
        point = np.array(start, float)
        point[free] = max(best, start[free])
        points.append(point)
    return min(points, key=lambda point: point @ gramian @ point)


@pytest.mark.parametrize("method", ["upgrad", "dualproj"])
def test_an_absolute_threshold_turns_projections_into_the_mean(method):
    weigh = {"upgrad": upgrad_weights, "dualproj": dualproj_weights}[method]
    whole = {
        "upgrad": ([0.292902, 1.900352, 1.900352], [0.292398, 1.900585, 1.900585]),
        "dualproj": ([0.556316, 1.110921, 1.110921], [0.555556, 1.111111, 1.111111]),
    }[method]
    starts = {"upgrad": np.eye(2) / 2, "dualproj": np.full((1, 2), 0.5)}[method]
    exact = {"upgrad": references.upgrad, "dualproj": references.dualproj}[method]
    for scale, published in ((1, whole[0]), (1e-3, [1, 1, 1])):
        rows = scale * SLANTED
        gramian = normalized(rows @ rows.T) + 1e-4 * np.eye(2)
        found = sum(lift(gramian, start) for start in starts) @ rows
        np.testing.assert_allclose(found / scale, published, atol=1e-6)
        direction = solve(weigh, rows)[1]
        np.testing.assert_allclose(direction / scale, whole[1], rtol=5e-6)
        np.testing.assert_allclose(direction, exact(rows), rtol=1e-5)
    # The mean conflicts with the first task; the projection does not.
    assert SLANTED[0] @ [1, 1, 1] == -2
    assert SLANTED[0] @ whole[1] > -1e-5


def worst_within_ball(rows, direction):
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(
        np.linalg.norm(direction - mean), 0.4 * np.linalg.norm(mean), rtol=1e-5
    )
    return np.min(rows @ direction)


@pytest.mark.parametrize(
    ("rows", "exact"),
    [
        (1e-3 * SLANTED, (0.346803e-3, 1.163299e-3, 1.163299e-3)),
        # The best convex combination is the first gradient, 1e-4 of all together.
        (np.diag([1, 1e4]), (2000.5, 5000)),
    ],
)
def test_absolute_thresholds_turn_cagrad_into_zero(rows, exact):
    shares = np.linspace(0, 1, 100001)
    matrix = normalized(rows @ rows.T)
    points = np.stack([shares, 1 - shares], axis=1)
    lengths = np.sqrt(np.sum(points @ matrix * points, axis=1))
    objective = points @ matrix @ [0.5, 0.5] + 0.2 * np.sqrt(matrix.sum()) * lengths
    assert lengths[np.argmin(objective)] < 1e-4  # Taken for a stationary point.
    _, direction = solve(cagrad_weights, rows)
    np.testing.assert_allclose(direction, exact, rtol=1e-5)
    worst = worst_within_ball(rows, direction)
    assert worst == pytest.approx(worst_within_ball(rows, references.cagrad(rows, 0.4)))


@pytest.mark.parametrize(
    ("scale", "published"),
    [(1, (0.3468, 1.1633, 1.1633)), (1e-2, 1.400), (1e-6, 23.97)],
)
def test_cagrad_by_a_solver_that_stops_at_once_and_constants_under_roots(
    scale, published
):
    rows = scale * SLANTED
    gramian, mean = rows @ rows.T, np.full(2, 0.5)
    radius = 0.4 * np.sqrt(gramian.mean() + 1e-8) + 1e-8
    shares = minimize(
        lambda w: w @ gramian @ mean + radius * np.sqrt(w @ gramian @ w + 1e-8),
        mean,
        bounds=[(0, 1)] * 2,
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
    ).x
    point = shares @ rows
    found = rows.mean(axis=0) + radius / (np.linalg.norm(point) + 1e-8) * point
    np.testing.assert_allclose(found / scale, np.broadcast_to(published, 3), rtol=2e-4)
    _, direction = solve(cagrad_weights, rows)
    np.testing.assert_allclose(direction, references.cagrad(rows, 0.4), rtol=1e-5)
    exact = (0.346803, 1.163299, 1.163299)
    np.testing.assert_allclose(direction / scale, exact, rtol=5e-6)


def assert_shortest(rows, point):
    """No gradient has a smaller inner product with the shortest point than itself."""
    assert np.min(rows @ point) >= point @ point * (1 - 1e-5)


def test_mgda_by_a_hundred_steps_of_frank_wolfe():
    rows = np.array([[-2.0, -3, -3], [1, -1, 4], [5, 5, 5]])
    gramian, shares = rows @ rows.T, np.full(3, 1 / 3)
    for _ in range(100):
        product = gramian @ shares
        corner = np.argmin(product)
        apart = shares @ product - product[corner]
        size = apart / (apart + gramian[corner, corner] - product[corner])
        size = np.clip(size, 0, 1)
        shares = (1 - size) * shares + size * np.eye(3)[corner]
        if size < 1e-3:
            break
    found, exact = shares @ rows, np.array([40, -25, -10]) / 93
    np.testing.assert_allclose(found, (0.395, -0.391, 0.059), atol=5e-4)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(0.40, abs=5e-3)
    assert_shortest(rows, exact)
    np.testing.assert_allclose(solve(mgda_weights, rows)[1], exact, rtol=1e-4)


def test_mgda_with_a_share_kept_from_the_corner():
    rows = np.array([[1.0, 0], [6000, 8000]])
    # As g_1 · g_2 >= |g_1|², the first has all but 0.001.
    assert rows[0] @ rows[1] >= rows[0] @ rows[0]
    np.testing.assert_allclose((0.999, 0.001) @ rows, (6.999, 8))
    assert_shortest(rows, rows[0])
    np.testing.assert_allclose(solve(mgda_weights, rows)[1], (1, 0), atol=1e-6)


def published_pcgrad(rows, orders, *, skips_itself, epsilon=0.0):
    total = np.zeros(rows.shape[1])
    for task, order in enumerate(orders):
        gradient = rows[task].copy()
        for other in order:
            overlap = gradient @ rows[other]
            if overlap < 0 and not (skips_itself and other == task):
                squared = rows[other] @ rows[other] + epsilon
                gradient -= overlap / squared * rows[other]
        total += gradient
    return total


TRIPLE = np.array([[0.0, 1], [-2, 1], [1, -1]])
ORDERS = np.array([[1, 2, 0], [0, 2, 1], [0, 1, 2]])


def test_pcgrad_that_projects_a_gradient_against_itself():
    # The third becomes (1, 0), then (0.2, 0.4), at an obtuse angle to where it began.
    found = published_pcgrad(TRIPLE, ORDERS, skips_itself=False)
    np.testing.assert_allclose(found, (0.3, 0.3))
    exact = published_pcgrad(TRIPLE, ORDERS, skips_itself=True)
    np.testing.assert_allclose(exact, (0.2, 0.4))
    _, direction = solve(pcgrad_weights, TRIPLE, jnp.asarray(ORDERS))
    np.testing.assert_allclose(direction, exact, atol=1e-6)


def test_pcgrad_depends_on_the_order_in_any_code():
    reverse = np.array([[2, 1, 0], [2, 0, 1], [1, 0, 2]])
    found = published_pcgrad(TRIPLE, reverse, skips_itself=True)
    np.testing.assert_allclose(found, (-0.4, 0.6), atol=1e-12)
    _, direction = solve(pcgrad_weights, TRIPLE, jnp.asarray(reverse))
    np.testing.assert_allclose(direction, found, atol=1e-6)
    # Neither order spares all tasks.
    assert np.min(TRIPLE @ found) < 0
    assert np.min(TRIPLE @ (0.2, 0.4)) < 0


def test_pcgrad_with_a_constant_in_the_divisor():
    # 1e-8 is |g_1|² and half of |g_2|²: projections are a half and two thirds of
    # themselves, the weights (3/2, 4/3) in place of (2, 3/2).
    rows, orders = 1e-4 * PLANE, [[0, 1], [0, 1]]
    found = published_pcgrad(rows, orders, skips_itself=False, epsilon=1e-8)
    np.testing.assert_allclose(found, (1e-4 / 6, 4e-4 / 3))
    _, direction = solve(pcgrad_weights, rows, jnp.asarray(orders))
    np.testing.assert_allclose(direction, (0.5e-4, 1.5e-4), rtol=1e-5)
    # Orthogonal to what they conflicted with, (1, 1) / 2 and (0, 1) of the plane.
    projected = 1e-4 * np.array([[0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(np.sum(projected * rows[::-1], axis=1), 0)
    np.testing.assert_allclose(direction, projected.sum(axis=0), rtol=1e-5)


def test_imtl_g_by_the_pseudo_inverse_of_opposite_gradients():
    rows = np.stack([G, -3 * G])
    values = np.linalg.pinv(rows @ rows.T) @ np.linalg.norm(rows, axis=1)
    found = values / values.sum() @ rows
    np.testing.assert_allclose(found, -5 * G, atol=1e-9)
    # Its projections on the two are −25 and 25: not equal, which only 0 has of all G.
    np.testing.assert_allclose(rows @ found / np.linalg.norm(rows, axis=1), (-25, 25))
    np.testing.assert_allclose(solve(imtl_g_weights, rows)[1], 0, atol=1e-5)


@pytest.mark.parametrize("second", [G, 0 * G])
def test_imtl_g_by_an_inverse_of_differences(second):
    rows = np.stack([G, second])
    with np.errstate(invalid="ignore"):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    matrix = (rows[:1] - rows[1:]) @ (unit[:1] - unit[1:]).T
    if np.any(second):
        with pytest.raises(np.linalg.LinAlgError, match="Singular"):
            np.linalg.inv(matrix)
    else:
        assert np.all(np.isnan(matrix))
    # Any convex combination of duplicates; and no angle to keep with a zero.
    np.testing.assert_allclose(solve(imtl_g_weights, rows)[1], G, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "product"), [(1e-3, 0), (1e3, np.inf)], ids=["underflow", "overflow"]
)
def test_gls_by_the_product_of_the_losses(loss, product):
    losses = np.full(16, loss, np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = np.prod(losses)
        derivatives = found ** np.float32(1 / 16 - 1) * (found / losses) / 16
    assert found == product
    assert np.all(np.isnan(derivatives))
    wide = losses.astype(np.float64)
    exact = np.prod(wide) ** (1 / 16) / wide / 16
    np.testing.assert_allclose(exact, 1 / 16)
    np.testing.assert_allclose(gls_weights(jnp.asarray(losses)), exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "published", "size"),
    [
        ([G, -3 * G], -1.443e-3 * G, 1.443e-3),
        ([[-3, -2], [5, 3], [-5, 5], [1, 3]], (-0.391, 0.635), 0.323),
    ],
)
def test_upgrad_with_a_ridge_where_nothing_helps_all(rows, published, size):
    rows = np.array(rows, float)
    found = references.upgrad(rows, regularization=1e-4)
    np.testing.assert_allclose(found, published, atol=1e-3)
    relative = np.linalg.norm(found) / np.linalg.norm(rows.mean(axis=0))
    assert relative == pytest.approx(size, rel=2e-3)
    # With zero inside the hull, only zero of the span has no conflict.
    np.testing.assert_allclose(references.mgda(rows), 0, atol=1e-9)
    np.testing.assert_allclose(solve(upgrad_weights, rows)[1], 0, atol=1e-4)
    same = solve(upgrad_weights, rows, regularization=1e-4)[1]
    np.testing.assert_allclose(same, found, atol=1e-4)


def test_aligned_mtl_by_eigenvalues_of_unequal_gradients():
    rows = np.diag([1.0, 1e4])
    values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float32))
    kept = values > 2 * np.finfo(np.float32).eps * values[-1]
    np.testing.assert_array_equal(kept, [False, True])  # 1 is below 24 = 1e8 · 2 eps.
    values, vectors = values[kept], vectors[:, kept]
    found = np.sqrt(values[0]) * vectors / np.sqrt(values) @ vectors.T @ [0.5, 0.5]
    np.testing.assert_allclose(found @ rows, (0, 5000))
    _, direction = solve(aligned_mtl_weights, rows)
    np.testing.assert_allclose(direction, (0.5, 0.5), rtol=1e-5)
    np.testing.assert_allclose(direction, references.aligned_mtl(rows, "min"))


def test_dwa_by_a_buffer_that_begins_with_ones():
    # Constant losses: at the 27th call the older half of 50 has 23 ones in it.
    losses = np.array([10.0, 0.1])
    buffer = np.concatenate([np.ones((23, 2)), np.tile(losses, (27, 1))])
    ratios = buffer[25:].mean(axis=0) / buffer[:25].mean(axis=0)
    found = 2 * np.exp(ratios / 2) / np.exp(ratios / 2).sum()
    np.testing.assert_allclose(found, (1.891, 0.109), atol=5e-4)
    balancer, everyone = optim.dwa(2, window=25), jnp.ones(2, bool)

    def step(state, _):
        weights, state = balancer.weights(
            jnp.asarray(losses, jnp.float32), state, everyone
        )
        return state, weights

    _, weights = jax.lax.scan(step, balancer.init(), length=60)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


def test_dwa_by_the_exponential_of_a_ratio_as_it_is():
    latest, previous = np.array([1.0, 0.5]), np.array([1e-3, 1])
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.exp((latest / previous / 2).astype(np.float32))
        assert np.isnan(2 * values / values.sum())[0]
    found = dwa_weights(*(jnp.asarray(x, jnp.float32) for x in (latest, previous)))
    np.testing.assert_allclose(found, (2, 0), atol=1e-6)
