"""The toy problem of CAGrad: its values, and where the classic methods end up."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "toy.py"
SPECIFICATION = importlib.util.spec_from_file_location("toy", SCRIPT)
toy = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(toy)


@pytest.fixture(autouse=True)
def wide():
    # In 64 bits Optax's Adam raises a float to the power of an int32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


# Made by a separate implementation in NumPy.
@pytest.mark.parametrize(
    ("point", "values"),
    [
        ((-8.5, -5.0), (4.059918, -19.421502)),
        ((9.0, 9.0), (7.943949, 6.691495)),
        # Right between the minima, on the valley's floor but for 0.36 in x2.
        ((0.0, -8.0), (-15.089872, -15.089872)),
    ],
)
def test_values(point, values):
    found = toy.objectives(jnp.array(point))
    np.testing.assert_allclose(found, values, rtol=0, atol=5e-7)


def test_jacobian():
    found = jax.jacrev(toy.objectives)(jnp.array([-8.5, -5.0]))
    expected = [[-3.058504, 0.004483], [-0.295984, 0.320931]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)


def test_jacobian_is_that_of_finite_differences():
    # One point in each half plane, away from the walls' floors.
    for point in (np.array([2.3, 4.1]), np.array([-1.2, -2.7])):
        found = jax.jacrev(toy.objectives)(jnp.asarray(point))
        for axis in range(2):
            shift = np.eye(2)[axis] * 1e-6
            ahead, behind = (
                toy.objectives(jnp.asarray(point + sign * shift)) for sign in (1, -1)
            )
            slope = (ahead - behind) / 2e-6
            np.testing.assert_allclose(found[:, axis], slope, rtol=1e-7, atol=1e-8)


def ends(method, starts):
    """Where Adam leads from some starts."""
    paths = toy.descend(toy.METHODS[method], jnp.array(starts), toy.NUM_STEPS, 1000)
    return np.asarray(paths[:, -1])


# By the same separate implementation, to the digits given. CAGrad meets the Pareto set
# where its direction is not smooth, and Adam goes to and fro there by its step of 1e-3.
@pytest.mark.parametrize(
    ("method", "end", "tolerance"),
    [
        ("sum", (0.0, -8.3551), 1e-4),
        ("cagrad, c = 0.5", (0.0, -8.3551), 1e-3),
        ("mgda", (-6.993, -8.434), 1e-3),
        ("pcgrad", (-6.584, -8.426), 1e-3),
    ],
)
def test_end_from_the_bowl(method, end, tolerance):
    [found] = ends(method, toy.STARTS[1:2])
    np.testing.assert_allclose(found, end, rtol=0, atol=tolerance)
    if end[0] == 0.0:
        values = toy.objectives(jnp.asarray(found))
        np.testing.assert_allclose(values, -15.0916, rtol=0, atol=5e-3)


# From the other starts Adam jumps between two walls, where the last digit of the start
# changes later points by a tenth and more: only what does not depend on it is asserted.


def test_mean_stops_between_the_walls():
    found = ends("sum", toy.STARTS[::2])
    np.testing.assert_allclose(found, [(-5.02, 2.79), (5.01, 3.12)], rtol=0, atol=0.06)


def test_mgda_gets_to_the_pareto_set():
    found = ends("mgda", toy.STARTS[::2])
    expected = [(-3.32, -8.374), (3.33, -8.374)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "method", ["pcgrad", pytest.param("cagrad, c = 0.5", marks=pytest.mark.slow)]
)
def test_others_are_still_on_their_way(method):
    found = ends(method, toy.STARTS[::2])
    assert (np.sign(found[:, 0]) == (-1, 1)).all()
    # Past the point where the mean stops, in the throat that opens into the bowl.
    assert (np.abs(found[:, 0]) > 5.5).all()
    assert (np.abs(found[:, 0]) < 7.1).all()
    assert (np.abs(found[:, 1]) < 1).all()
