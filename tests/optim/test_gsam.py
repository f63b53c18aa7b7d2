"""Surrogate-gap gradients against closed forms and a float64 reference."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.optim import gsam, sharpness_aware

# theta = (3, 4/3), A = diag(1, 3): the gradient is (3, 4), of length 5.
THETA = {"x": jnp.array([3.0]), "y": jnp.array([[4.0 / 3.0]])}


def quadratic(params):
    return 0.5 * (params["x"][0] ** 2 + 3.0 * params["y"][0, 0] ** 2)


def flatten(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_quadratic_closed_form():
    # eps = 0.5 (3, 4) / 5, so g_sam = (3.3, 5.2), |g_sam|² = 37.93, g · g_sam = 30.7.
    # g_orth = (3, 4) − 30.7/37.93 (3.3, 5.2); the value is that at the moved point.
    orthogonal = np.array([3, 4]) - 30.7 / 37.93 * np.array([3.3, 5.2])
    expected = np.array([3.3, 5.2]) - 0.3 * orthogonal
    value, gradient = gsam(jax.value_and_grad(quadratic), 0.5, alpha=0.3)(THETA)
    np.testing.assert_allclose(flatten(gradient), expected, rtol=1e-6)
    np.testing.assert_allclose(value, 9.951667, rtol=1e-6)


def test_alpha_is_two_fifths_by_default_and_zero_means_sharpness_aware():
    value_and_grad = jax.value_and_grad(quadratic)
    plain = flatten(sharpness_aware(value_and_grad, 0.5)(THETA)[1])
    zero = flatten(gsam(value_and_grad, 0.5, alpha=0)(THETA)[1])
    np.testing.assert_array_equal(zero, plain)
    default = flatten(gsam(value_and_grad, 0.5)(THETA)[1])
    chosen = flatten(gsam(value_and_grad, 0.5, alpha=0.4)(THETA)[1])
    np.testing.assert_array_equal(default, chosen)
    assert np.linalg.norm(default - plain) > 0.01


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("adaptive", [False, True])
def test_matches_reference(adaptive, dtype):
    rng = np.random.default_rng(0)
    matrix, theta = rng.normal(size=(6, 6)), rng.normal(size=6)
    rho, alpha = 0.3, 0.7

    def slope(x):
        return (np.cosh(x @ matrix / 4) ** -2 / 4) @ matrix.T

    g = slope(theta)
    length = np.linalg.norm(np.abs(theta) * g if adaptive else g)
    s = slope(theta + rho * (theta**2 * g if adaptive else g) / length)
    expected = s - alpha * (g - (g @ s) / (s @ s) * s)

    def loss(params, scale):
        x = jnp.concatenate([params["a"], params["b"]])
        product = jnp.matmul(x, jnp.asarray(matrix, dtype), precision="highest")
        return scale * jnp.sum(jnp.tanh(product / 4))

    wrapped = gsam(jax.value_and_grad(loss), rho, alpha=alpha, adaptive=adaptive)
    wrapped = jax.jit(wrapped)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
        start = jnp.asarray(theta, dtype)
        for scale in (1e-6, 1, 1e6):
            _, gradient = wrapped(
                {"a": start[:2], "b": start[2:]}, jnp.asarray(scale, dtype)
            )
            assert gradient["a"].dtype == dtype
            error = np.linalg.norm(flatten(gradient) / scale - expected)
            assert error <= tolerance * np.linalg.norm(expected)


def test_gap_shrinks_while_the_worst_loss_stays():
    # To first order the extra term leaves f(theta + eps) alone and raises f(theta).
    value_and_grad = jax.value_and_grad(quadratic)
    _, perturbed = sharpness_aware(value_and_grad, 0.5)(THETA)
    extra = flatten(perturbed) - flatten(gsam(value_and_grad, 0.5, alpha=1)(THETA)[1])
    np.testing.assert_allclose(extra @ flatten(perturbed), 0, atol=1e-5)
    assert extra @ np.array([3.0, 4.0]) > 0.01


@pytest.mark.parametrize("adaptive", [False, True])
def test_zero_gradient_gives_zero(adaptive):
    zeros = jax.tree.map(jnp.zeros_like, THETA)
    wrapped = gsam(jax.value_and_grad(quadratic), 0.5, adaptive=adaptive)
    value, gradient = jax.jit(wrapped)(zeros)
    assert value == 0
    np.testing.assert_array_equal(flatten(gradient), 0)


def test_zero_gradient_at_the_moved_point_leaves_the_gap_alone():
    # min(x, 2) has slope 1 at 1.8 and none beyond 2, where the step leads.
    def loss(x):
        return jnp.where(x < 2, x, 2)

    _, gradient = gsam(jax.value_and_grad(loss), 0.5, alpha=0.25)(jnp.array(1.8))
    np.testing.assert_allclose(gradient, -0.25)


@pytest.mark.parametrize(("rho", "alpha"), [(-1, 0.4), (0.1, -0.5)])
def test_negative_arguments_are_refused(rho, alpha):
    with pytest.raises(ValueError, match=r"rho is -1|alpha is -0\.5"):
        gsam(jax.value_and_grad(quadratic), rho, alpha=alpha)
