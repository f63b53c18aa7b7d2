"""Gradients at the representation: where they must equal exact ones, and MGDA-UB."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import optim


def matmul(left, right):
    return jnp.matmul(left, right, precision="highest")


def model():
    """A tanh trunk with a tree of features, two heads, and a batch of five."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape))

    trunk_params = {"left": array(3, 4), "right": array(3, 2)}
    heads = {"sign": array(4), "size": {"kernel": array(6, 2)}}
    batch = (array(5, 3), array(5), array(5, 2))

    def trunk(params, inputs, signs, sizes):
        return {k: jnp.tanh(matmul(inputs, p)) for k, p in params.items()}

    def sign(features, head, inputs, signs, sizes):
        logits = matmul(features["left"], head)
        return jnp.mean(jax.nn.softplus(-logits * jnp.sign(signs)))

    def size(features, head, inputs, signs, sizes):
        joined = jnp.concatenate([features["left"], features["right"]], axis=-1)
        return jnp.mean((matmul(joined, head["kernel"]) - sizes) ** 2)

    return trunk, {"size": size, "sign": sign}, trunk_params, heads, batch


def evaluate(aggregator, active=None):
    trunk, losses, params, heads, batch = model()
    state = aggregator.init(jax.eval_shape(trunk, params, *batch))
    function = jax.jit(optim.at_representation(trunk, losses, aggregator))
    return function(params, heads, state, *batch, active=active)


def test_sum_equals_the_exact_gradient():
    with jax.enable_x64(True):
        trunk, losses, params, heads, batch = model()
        values, gradients, _ = evaluate(optim.sum(2))

        def each(params, heads):
            features = trunk(params, *batch)
            return jnp.stack(
                [loss(features, heads[name], *batch) for name, loss in losses.items()]
            )

        np.testing.assert_allclose(values, each(params, heads), rtol=1e-12)
        expected = jax.grad(lambda *p: jnp.sum(each(*p)), (0, 1))(params, heads)
        assert jax.tree.structure(gradients) == jax.tree.structure(expected)
        for mine, other in zip(
            jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(mine, other, rtol=1e-10)


def feature_rows():
    """Task gradients at the features, `[tasks, batch * width]`, and the pullback."""
    trunk, losses, params, heads, batch = model()
    features, pull_back = jax.vjp(lambda params: trunk(params, *batch), params)
    rows = []
    for name, loss in losses.items():
        slope = jax.grad(loss)(features, heads[name], *batch)
        rows.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(slope)]))
    return np.stack(rows), features, pull_back


def test_mgda_is_optimal_at_the_features():
    with jax.enable_x64(True):
        _, (gradient, _), state = evaluate(optim.mgda(2))
        rows, features, pull_back = feature_rows()
        weights = np.asarray(state.weights)
        # The optimality conditions of the shortest convex combination.
        direction = weights @ rows
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
        assert np.all(weights > 0)
        np.testing.assert_allclose(rows @ direction, direction @ direction, rtol=1e-9)
        # And the trunk's gradient is that direction, pulled back.
        left = features["left"].size
        combined = {
            "left": jnp.asarray(direction[:left]).reshape(features["left"].shape),
            "right": jnp.asarray(direction[left:]).reshape(features["right"].shape),
        }
        (expected,) = pull_back(combined)
        for name in expected:
            np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-9)


def test_inactive_task_is_absent():
    _, (gradient, head_gradients), state = evaluate(
        optim.mgda(2), jnp.array([True, False])
    )
    trunk, losses, params, heads, batch = model()
    expected, head = jax.grad(
        lambda params, head: losses["size"](trunk(params, *batch), head, *batch), (0, 1)
    )(params, heads["size"])
    np.testing.assert_array_equal(state.weights, [1, 0])
    for name in expected:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(head_gradients["sign"], 0)
    np.testing.assert_allclose(
        head_gradients["size"]["kernel"], head["kernel"], rtol=1e-4
    )


def test_losses_reach_the_aggregator():
    def weigh(gramian, active, losses):
        return losses

    _, (gradient, _), state = evaluate(optim.from_weights(weigh, 2, needs_losses=True))
    values, _, _ = evaluate(optim.sum(2))
    np.testing.assert_allclose(state.weights, values, rtol=1e-6)
    assert jnp.any(gradient["left"] != 0)


def test_task_without_a_head_is_explained():
    trunk, losses, params, heads, batch = model()
    aggregator = optim.sum(2)
    with pytest.raises(ValueError, match="give every task a loss and a head"):
        optim.at_representation(trunk, losses, aggregator)(
            params, {"sign": heads["sign"]}, aggregator.init(params), *batch
        )
