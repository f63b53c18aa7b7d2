"""Rep-MTL's regulariser: worked numbers, a plain reference, and its derivatives."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import optim

every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
entropy = jax.jit(optim.task_saliency_entropy)
alignment = jax.jit(optim.cross_task_alignment, static_argnums=1)


def precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def alignment_reference(saliencies, temperature):
    """By the definition, with channel by channel matrices, in float64."""
    num_tasks, batch = saliencies.shape[:2]
    flat = saliencies.reshape(num_tasks, batch, -1, saliencies.shape[-1])

    def unit(matrix):
        return matrix.ravel() / np.linalg.norm(matrix)

    anchors = [flat[:, b].mean(axis=1).T for b in range(batch)]
    anchors = [unit(a @ a.T) for a in anchors]
    terms = []
    for b in range(batch):
        others = [np.exp(anchors[b] @ a / temperature) for a in anchors]
        pushed = np.log(sum(others) - others[b])
        for t in range(num_tasks):
            pulled = anchors[b] @ unit(flat[t, b].T @ flat[t, b]) / temperature
            terms.append(pushed - pulled)
    return np.mean(terms)


@every_dtype
def test_worked_numbers(dtype):
    # Three tasks, four examples, five channels, 2 × 3 positions, channels then last.
    saliencies = np.random.default_rng(7).standard_normal((3, 4, 5, 2, 3))
    tolerance = 1e-5 if dtype == np.float32 else 1e-9
    with precision(dtype):
        stack = jnp.asarray(saliencies.transpose(0, 1, 3, 4, 2), dtype)
        np.testing.assert_allclose(entropy(stack), 0.9170227496, rtol=tolerance)
        for temperature, expected in ((1.0, 0.9871163385), (0.1, 0.7542874223)):
            result = alignment(stack, temperature)
            assert result.dtype == dtype
            np.testing.assert_allclose(result, expected, rtol=tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (2, 3, 2, 2, 9), (3, 2, 6)])
def test_alignment_matches_reference(shape):
    saliencies = np.random.default_rng(0).normal(size=shape)
    result = alignment(jnp.asarray(saliencies, jnp.float32), 0.3)
    np.testing.assert_allclose(result, alignment_reference(saliencies, 0.3), rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4, 63), (2, 3, 9, 7, 16)])
def test_alignment_forms_the_smaller_matrix_only(shape):
    # 16 positions of 63 channels, then 63 positions of 16 channels.
    slope = jax.jit(jax.grad(lambda stack: optim.cross_task_alignment(stack, 1.0)))
    program = slope.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).as_text()
    assert "x16x16xf32" in program
    assert "63x63xf32" not in program


def test_entropy_by_hand():
    # Means over two channels: task 0 has (1, −3), task 1 has (1, 1), at two positions
    # of one example: shares (½, ½) and (¾, ¼), by their sizes.
    saliencies = jnp.array([[[[0.0, 2], [-2, -4]]], [[[3, -1], [1, 1]]]])
    expected = (np.log(2) + (0.75 * np.log(4 / 3) + 0.25 * np.log(4))) / 2
    np.testing.assert_allclose(entropy(saliencies), expected, rtol=1e-6)


def test_entropy_is_bounded():
    one = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 4)), jnp.float32)
    np.testing.assert_allclose(entropy(one), 0, atol=1e-7)
    signs = jnp.array([1.0, -1, 1, -1]).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(entropy(signs * one), np.log(4), rtol=1e-6)
    np.testing.assert_array_equal(entropy(jnp.zeros((4, 2, 3, 4))), 0)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_scale_of_all_saliencies_does_not_matter(scale):
    rng = np.random.default_rng(1)
    saliencies = jnp.asarray(rng.normal(size=(3, 4, 2, 3, 5)), jnp.float32)
    both = functools.partial(jax.value_and_grad, argnums=0)
    for function, arguments in ((entropy, ()), (alignment, (0.5,))):
        value, slope = both(function)(saliencies, *arguments)
        scaled, scaled_slope = both(function)(scale * saliencies, *arguments)
        np.testing.assert_allclose(scaled, value, rtol=1e-5)
        np.testing.assert_allclose(
            scale * scaled_slope, slope, rtol=1e-3, atol=1e-4 * np.abs(slope).max()
        )


@pytest.mark.parametrize("function", [entropy, lambda s, a: alignment(s, 0.5, a)])
def test_inactive_task_is_absent(function):
    rng = np.random.default_rng(2)
    saliencies = jnp.asarray(rng.normal(size=(3, 4, 6, 5)), jnp.float32)
    active = jnp.array([True, False, True])
    value, slope = jax.value_and_grad(function)(saliencies, active)
    fewer = saliencies[jnp.array([0, 2])]
    expected = function(fewer, jnp.ones(2, bool))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(slope[1], 0)
    assert jnp.any(slope[0] != 0)
    assert function(saliencies, jnp.zeros(3, bool)) == 0


def test_all_active_is_the_default():
    saliencies = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4, 6, 5)))
    everyone = jnp.ones(3, bool)
    np.testing.assert_allclose(
        entropy(saliencies, everyone), entropy(saliencies), rtol=1e-6
    )
    np.testing.assert_allclose(
        alignment(saliencies, 1.0, everyone), alignment(saliencies, 1.0), rtol=1e-6
    )


def test_zero_saliencies_have_finite_derivatives():
    rng = np.random.default_rng(4)
    saliencies = rng.normal(size=(3, 4, 6, 5)).astype(np.float32)
    # A task of no gradient, an example of none, a channel mean and a spatial mean of 0.
    saliencies[1], saliencies[:, 2], saliencies[0, 0, 0] = 0, 0, [1, -1, 1, -1, 0]
    saliencies[:, 1] -= saliencies[:, 1].mean(axis=1, keepdims=True)
    for stack in (saliencies, np.zeros_like(saliencies)):
        for function in (entropy, lambda stack: alignment(stack, 0.1)):
            value, slope = jax.value_and_grad(function)(jnp.asarray(stack))
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))


def model(dtype):
    """A smooth trunk on 2 × 3 positions and two smooth heads with a batch of four."""
    rng = np.random.default_rng(5)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    trunk, inputs = array(3, 5), array(4, 2, 3, 3)
    heads = {"shape": array(5, 2), "depth": {"kernel": array(5), "bias": array(1)}}
    targets = (array(4, 2, 3, 2), array(4, 2, 3))

    def features(trunk):
        return jnp.tanh(jnp.matmul(inputs, trunk, precision="highest"))

    def shape(features, head, shapes, depths):
        outputs = jnp.tanh(jnp.matmul(features, head, precision="highest"))
        return jnp.log(jnp.mean((outputs - shapes) ** 2))

    def depth(features, head, shapes, depths):
        outputs = jnp.matmul(features**2, head["kernel"], precision="highest")
        return jnp.mean(jnp.cosh((outputs + head["bias"][0] - depths) / 4))

    return features, {"shape": shape, "depth": depth}, trunk, heads, targets


def test_regularizer_is_made_of_its_parts():
    features, losses, trunk, heads, targets = model(np.float32)
    z = features(trunk)
    result, values = jax.jit(
        lambda: optim.rep_mtl_regularizer(
            losses,
            heads,
            z,
            *targets,
            entropy_weight=0.7,
            alignment_weight=1.3,
            temperature=0.2,
        )
    )()
    pairs = [
        jax.value_and_grad(loss)(z, heads[name], *targets)
        for name, loss in losses.items()
    ]
    saliencies = jnp.stack([slope for _, slope in pairs])
    expected = 0.7 * entropy(saliencies) + 1.3 * alignment(saliencies, 0.2)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    np.testing.assert_allclose(values, [value for value, _ in pairs], rtol=1e-5)


def test_second_derivatives_match_finite_differences():
    with jax.enable_x64(True):
        features, losses, trunk, heads, targets = model(np.float64)

        def objective(params):
            trunk, heads = params
            regularizer, values = optim.rep_mtl_regularizer(
                losses, heads, features(trunk), *targets, temperature=0.5
            )
            return regularizer + jnp.sum(values)

        both = jax.jit(jax.value_and_grad(objective))
        params = (trunk, heads)
        _, slope = both(params)
        rng, step = np.random.default_rng(6), 1e-5
        for _ in range(3):
            direction = jax.tree.map(
                lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params
            )
            expected = sum(
                jnp.sum(a * b)
                for a, b in zip(
                    jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True
                )
            )
            ahead, behind = (
                both(
                    jax.tree.map(
                        lambda p, d, s=sign: p + s * step * d, params, direction
                    )
                )[0]
                for sign in (1, -1)
            )
            np.testing.assert_allclose(
                (ahead - behind) / (2 * step), expected, rtol=1e-6, atol=1e-7
            )


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="has 1 example"):
        optim.cross_task_alignment(jnp.ones((2, 1, 3, 4)), 1.0)
    with pytest.raises(ValueError, match="temperature is 0"):
        optim.cross_task_alignment(jnp.ones((2, 2, 3, 4)), 0)
    features, losses, trunk, _, targets = model(np.float32)
    with pytest.raises(ValueError, match="give every task a loss and a head"):
        optim.rep_mtl_regularizer(losses, {}, features(trunk), *targets)
