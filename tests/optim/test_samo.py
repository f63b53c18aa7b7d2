"""SAMO: its pieces against hand-derived numbers, and put together on small models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import optim
from mtl_jax.optim.samo import samo_perturbation, spsa


def test_perturbation_by_hand():
    # Leaves of g: (3, 4) of length 5 and (0, 12) of length 12. Leaves of e: (0, 2) and
    # (1, 0), rescaled to (0, 5) and (12, 0). With beta = .25 the mix is .75 (3, 4) +
    # .25 (0, 5) = (2.25, 4.25) and .75 (0, 12) + .25 (12, 0) = (3, 9), of squared
    # length 5.0625 + 18.0625 + 9 + 81 = 113.125.
    mean_gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[0.0, 12.0]])}
    estimate = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([[1.0, 0.0]])}
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0, 0.5]])}
    step = samo_perturbation(mean_gradient, estimate, params, 0.5, beta=0.25)
    length = np.sqrt(113.125)
    np.testing.assert_allclose(step["a"], 0.5 / length * np.array([2.25, 4.25]), 1e-6)
    np.testing.assert_allclose(step["b"], 0.5 / length * np.array([[3, 9]]), 1e-6)

    # |theta| times the mix: (2.25, 8.5) and (9, 4.5), of squared length 178.5625; the
    # step has another factor |theta|.
    step = samo_perturbation(
        mean_gradient, estimate, params, 0.5, beta=0.25, adaptive=True
    )
    length = np.sqrt(178.5625)
    np.testing.assert_allclose(step["a"], 0.5 / length * np.array([2.25, 17]), 1e-6)
    np.testing.assert_allclose(step["b"], 0.5 / length * np.array([[27, 2.25]]), 1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scales_of_gradient_and_estimate_do_not_matter(scale):
    rng = np.random.default_rng(0)
    mean_gradient, estimate, params = (
        {"a": jnp.asarray(rng.normal(size=5), jnp.float32)} for _ in range(3)
    )
    step = samo_perturbation(mean_gradient, estimate, params, 0.1)
    np.testing.assert_allclose(np.linalg.norm(step["a"]), 0.1, rtol=1e-6)
    for first, second in ((scale, 1), (1, scale)):
        other = samo_perturbation(
            {"a": first * mean_gradient["a"]},
            {"a": second * estimate["a"]},
            params,
            0.1,
        )
        np.testing.assert_allclose(other["a"], step["a"], rtol=1e-5, atol=1e-8)


def test_zero_estimate_or_gradient_stays_finite():
    gradient, zero = {"a": jnp.array([3.0, 4.0])}, {"a": jnp.zeros(2)}
    step = samo_perturbation(gradient, zero, gradient, 0.5)
    np.testing.assert_allclose(step["a"], [0.3, 0.4], rtol=1e-6)
    # The estimate takes the length of the mean gradient, hence adds nothing.
    step = samo_perturbation(zero, gradient, gradient, 0.5)
    np.testing.assert_array_equal(step["a"], 0)


def test_spsa_is_unbiased_on_a_quadratic():
    # The central difference of a quadratic is exact: e = (g · z) z, whose mean is g and
    # whose covariance is |g|² I + g gᵀ.
    params = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([[0.5]])}
    slope = np.array([1.0, -2.0, 1.5])

    def loss(params):
        curvature = jnp.array([1.0, 2.0])
        return (
            0.5 * jnp.sum(curvature * params["a"] ** 2) + 1.5 * params["b"][0, 0] ** 2
        )

    keys = jax.random.split(jax.random.key(0), 4000)
    estimates = jax.jit(jax.vmap(lambda key: spsa(loss, params, key)))(keys)
    flat = np.concatenate([estimates["a"], estimates["b"][:, 0]], axis=1)
    spread = np.sqrt((slope @ slope + slope**2) / len(keys))
    assert np.all(np.abs(flat.mean(axis=0) - slope) <= 4 * spread)
    np.testing.assert_allclose(
        np.cov(flat.T), slope @ slope * np.eye(3) + np.outer(slope, slope), atol=1.5
    )


def tasks():
    """Two quadratics of the shared parameters, each with a head of its own."""
    first, second = jnp.array([1.0, 4.0]), jnp.array([3.0, 1.0])
    losses = {
        "b": lambda x, head: 0.5 * jnp.sum(first * (x - head) ** 2),
        "a": lambda x, head: 0.5 * jnp.sum(second * (x + head) ** 2),
    }
    heads = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([2.0, 0.0])}
    return losses, jnp.array([1.0, 1.0]), heads


def test_shared_ascent_by_hand():
    # Gradients at x = (1, 1): first (x − (2, 0)) = (−1, 4); second (x + (0, 1)) =
    # (3, 2), so the mean is (1, 3). With beta = 0 both tasks move x by
    # .5 (1, 3)/sqrt(10). Heads climb by .5 along their own gradients (1, −4)/sqrt(17)
    # and (3, 2)/sqrt(13).
    losses, x, heads = tasks()
    evaluate = jax.jit(optim.samo(losses, optim.sum(2), 0.5, beta=0))
    state = optim.sum(2).init(x)
    values, (gradient, head_gradients), _ = evaluate(x, heads, state, jax.random.key(0))
    moved = np.array([1, 1]) + 0.5 * np.array([1, 3]) / np.sqrt(10)
    head_b = np.array([2, 0]) + 0.5 * np.array([1, -4]) / np.sqrt(17)
    head_a = np.array([0, 1]) + 0.5 * np.array([3, 2]) / np.sqrt(13)
    slope_b = np.array([1, 4]) * (moved - head_b)
    slope_a = np.array([3, 1]) * (moved + head_a)
    np.testing.assert_allclose(values, [0.5 * (1 + 4), 0.5 * (3 + 4)], rtol=1e-6)
    np.testing.assert_allclose(gradient, slope_a + slope_b, rtol=1e-5)
    np.testing.assert_allclose(head_gradients["b"], -slope_b, rtol=1e-5)
    np.testing.assert_allclose(head_gradients["a"], slope_a, rtol=1e-5)


def test_own_ascent_goes_uphill_along_a_fresh_direction():
    # With beta = 1 and no heads, task k moves by rho along ± z_k, with the sign that
    # raises its loss. Two equal tasks draw apart. The slope 2 y of |y|² tells where
    # it was taken.
    losses = dict.fromkeys(["a", "b"], lambda x, head: jnp.sum(x**2))
    rows = optim.from_rows(lambda task_gradients, active: task_gradients, 2)
    evaluate = jax.jit(optim.samo(losses, rows, 0.3, beta=1))
    x, heads = jnp.array([0.5, 1.0, -2.0]), {"a": {}, "b": {}}
    seen = []
    for seed in range(2):
        key = jax.random.key(seed)
        _, (stack, _), _ = evaluate(x, heads, rows.init(x), key)
        steps = np.asarray(stack) / 2 - np.asarray(x)
        np.testing.assert_allclose(np.linalg.norm(steps, axis=1), 0.3, rtol=1e-5)
        assert np.all(steps @ np.asarray(x) > 0)
        seen.extend(steps)
    for i in range(4):
        for j in range(i):
            assert np.linalg.norm(seen[i] - seen[j]) > 1e-2


def test_inactive_task_is_absent():
    losses, x, heads = tasks()
    evaluate = jax.jit(optim.samo(losses, optim.sum(2), 0.5, beta=0))
    state = optim.sum(2).init(x)
    key = jax.random.key(0)
    _, (gradient, head_gradients), _ = evaluate(
        x, heads, state, key, active=jnp.array([False, True])
    )
    # Only the second loss counts in the mean: up by .5 (3, 2)/sqrt(13).
    step = 0.5 * np.array([3, 2]) / np.sqrt(13)
    slope = np.array([3, 1]) * (np.array([1, 2]) + 2 * step)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)
    np.testing.assert_array_equal(head_gradients["b"], 0)
    np.testing.assert_allclose(head_gradients["a"], slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -1}, "rho is -1"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"radius": 0}, "radius is 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.samo(tasks()[0], optim.sum(2), **arguments)
