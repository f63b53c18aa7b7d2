"""Sharpness-aware gradients against closed forms and Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.optim import sharpness_aware

CURVATURE = jnp.array([1.0, 3.0])
# theta = (3, 4/3): the gradient A theta is (3, 4), of length 5.
THETA = {"x": jnp.array([3.0]), "y": jnp.array([[4.0 / 3.0]])}


def quadratic(params):
    x, y = params["x"][0], params["y"][0, 0]
    return 0.5 * (CURVATURE[0] * x**2 + CURVATURE[1] * y**2)


def test_quadratic_closed_form():
    # eps = 0.5 (3, 4) / 5 = (0.3, 0.4), so the point is (3.3, 26/15), the gradient
    # (3.3, 5.2) and the value (3.3² + 3 (26/15)²) / 2 = 5.445 + 4.506667.
    value, gradient = sharpness_aware(jax.value_and_grad(quadratic), 0.5)(THETA)
    np.testing.assert_allclose(gradient["x"], [3.3], rtol=1e-6)
    np.testing.assert_allclose(gradient["y"], [[5.2]], rtol=1e-6)
    np.testing.assert_allclose(value, 9.951667, rtol=1e-6)


def test_adaptive_closed_form():
    # |theta| g = (9, 16/3), of length sqrt(81 + 256/9) = sqrt(985)/3;
    # eps = rho theta² g / length = rho (27, 64/9) * 3 / sqrt(985).
    rho = 0.1
    moved = np.array([3, 4 / 3]) + rho * np.array([27, 64 / 9]) * 3 / np.sqrt(985)
    wrapped = sharpness_aware(jax.value_and_grad(quadratic), rho, adaptive=True)
    _, gradient = wrapped(THETA)
    np.testing.assert_allclose(gradient["x"], [moved[0]], rtol=1e-6)
    np.testing.assert_allclose(gradient["y"], [[3 * moved[1]]], rtol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_zero_gradient_moves_nothing(adaptive):
    zeros = jax.tree.map(jnp.zeros_like, THETA)
    wrapped = sharpness_aware(jax.value_and_grad(quadratic), 0.5, adaptive=adaptive)
    value, gradient = jax.jit(wrapped)(zeros)
    assert value == 0
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_of_the_loss_does_not_matter(scale):
    def scaled(params):
        return scale * quadratic(params)

    _, gradient = sharpness_aware(jax.value_and_grad(scaled), 0.5)(THETA)
    np.testing.assert_allclose(gradient["x"] / scale, [3.3], rtol=1e-5)


def test_step_survives_bfloat16_gradients():
    params = jnp.full(2048, 2.0, jnp.bfloat16)
    # Gradient 2 everywhere, length 2 sqrt(2048); a bfloat16 sum of squares would stall.
    # rho = sqrt(2048) moves every entry by 1, to 3.
    wrapped = sharpness_aware(
        jax.value_and_grad(lambda p: 0.5 * jnp.sum(p.astype(jnp.float32) ** 2)),
        float(np.sqrt(2048)),
    )
    _, gradient = wrapped(params)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), 3.0)


def test_separate_ascent_and_stacked_descent():
    def per_task(params, shift):
        losses = jnp.stack([quadratic(params) + shift, params["x"][0] ** 3])
        task_gradients = jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            jax.grad(quadratic)(params),
            jax.grad(lambda p: p["x"][0] ** 3)(params),
        )
        return losses, task_gradients

    def ascent(params, shift):
        # Up along x only, whatever its size; the value is not used.
        return "unused", {"x": 7 * shift[None], "y": jnp.zeros((1, 1))}

    wrapped = sharpness_aware(per_task, 0.5, ascent=ascent)
    losses, gradients = wrapped(THETA, jnp.array(1.0))
    # Moved to (3.5, 4/3): losses 3.5²/2 + 8/3 + 1 and 3.5³, gradients there.
    np.testing.assert_allclose(losses, [6.125 + 8 / 3 + 1, 3.5**3], rtol=1e-6)
    np.testing.assert_allclose(gradients["x"][:, 0], [3.5, 3 * 3.5**2], rtol=1e-6)
    np.testing.assert_allclose(gradients["y"][:, 0, 0], [4, 0], rtol=1e-6)


def test_agrees_with_optax_over_several_steps():
    def loss(params, batch):
        prediction = jnp.tanh(batch @ params["kernel"]) @ params["head"]
        return jnp.mean((prediction - jnp.sum(batch, axis=-1)) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": 0.5 * jax.random.normal(keys[0], (5, 8)),
        "head": 0.5 * jax.random.normal(keys[1], (8,)),
    }
    batches = jax.random.normal(keys[2], (5, 16, 5))
    rho, outer = 0.05, optax.sgd(0.1, momentum=0.9)

    ours, state = params, outer.init(params)
    wrapped = jax.jit(sharpness_aware(jax.value_and_grad(loss), rho))
    for batch in batches:
        _, gradient = wrapped(ours, batch)
        updates, state = outer.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)

    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    peer = optax.contrib.sam(outer, ascent, opaque_mode=True)
    theirs, state = params, peer.init(params)
    for batch in batches:
        gradient_at = jax.grad(lambda p, _, batch=batch: loss(p, batch))
        updates, state = peer.update(
            gradient_at(theirs, 0), state, theirs, grad_fn=gradient_at
        )
        theirs = optax.apply_updates(theirs, updates)

    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


def test_negative_radius_is_refused():
    with pytest.raises(ValueError, match="rho is -1"):
        sharpness_aware(jax.value_and_grad(quadratic), -1)
