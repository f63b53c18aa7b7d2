"""Task-based flat regions: the worked quadratic example, and a model with heads."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import optim
from mtl_jax.optim.flat_regions import flat_perturbation
from mtl_jax.optim.sharpness import uphill

every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
RHO = 0.1


def precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


# L_k = ½ (t − b_k)ᵀ A_k (t − b_k) at t = (.5, .2) with A_1 = diag(1, 10), b_1 = (1, 0),
# A_2 = diag(10, 1), b_2 = (0, 1). g_1 = (−.5, 2) has length 2.061553, so the step is
# .1 g_1 / 2.061553 = (−.024254, .097014) and
# s_1 = g_1 + A_1 step = (−.524254, 2.970143).
CURVATURES = np.array([[1.0, 10.0], [10.0, 1.0]])
CENTRES = np.array([[1.0, 0.0], [0.0, 1.0]])
START = np.array([0.5, 0.2])
PLAIN = np.array([[-0.5, 2.0], [5.0, -0.8]])
PERTURBED = np.array([[-0.524254, 2.970143], [5.987441, -0.815799]])
# method -> (factor, separate, direct); the published code multiplies MGDA by 2.
WORKED = {
    "sum": (1, (5.463187, 2.154343), (5.463187, 2.154343)),
    "pcgrad": (1, (5.819120, 3.995654), (6.054649, 3.846131)),
    "upgrad": (1, (2.909560, 1.997827), (3.027325, 1.923065)),
    "mgda": (2, (2.357586, 3.743287), (2.316302, 3.983963)),
    "cagrad": (1, (2.686272, 2.183118), (2.527437, 2.233815)),
    "imtl_g": (1, (1.568511, 1.671345), (1.643759, 1.709646)),
}


def worked_losses(dtype):
    def loss(k):
        curvature, centre = CURVATURES[k].astype(dtype), CENTRES[k].astype(dtype)
        return lambda t, head: 0.5 * jnp.sum(curvature * (t - centre) ** 2)

    return {"second": loss(0), "first": loss(1)}


@functools.cache
def compiled(name, num_tasks=2):
    """The aggregator, its update compiled once however often it is used."""
    aggregator = getattr(optim, name)(num_tasks)
    return optim.Aggregator(aggregator.init, jax.jit(aggregator.update))


@every_dtype
@pytest.mark.parametrize("name", WORKED)
def test_worked_aggregations(name, dtype):
    factor, separate, together = WORKED[name]
    lengths = np.linalg.norm(PLAIN, axis=1, keepdims=True)
    perturbed = PLAIN + RHO * CURVATURES * PLAIN / lengths
    np.testing.assert_allclose(perturbed, PERTURBED, atol=1e-6)
    with precision(dtype):
        plain, perturbed = jnp.asarray(PLAIN, dtype), jnp.asarray(perturbed, dtype)
        for direct, expected in ((False, separate), (True, together)):
            aggregator = optim.flat_regions(compiled(name), direct=direct)
            state = aggregator.init(plain[0])
            result, new_state = aggregator.update(perturbed, state, plain=plain)
            assert result.dtype == dtype
            np.testing.assert_allclose(factor * result, expected, atol=3e-6)
            assert jax.tree.structure(new_state) == jax.tree.structure(state)


@every_dtype
@pytest.mark.parametrize("direct", [False, True], ids=["separate", "direct"])
def test_worked_quadratic(direct, dtype):
    _, *expected = WORKED["upgrad"]
    aggregator = compiled("upgrad")
    heads = {"second": {}, "first": {}}
    evaluate = optim.flat_value_and_grad(
        worked_losses(dtype), aggregator, RHO, direct=direct
    )
    with precision(dtype):
        start = jnp.asarray(START, dtype)
        state = optim.flat_regions(aggregator, direct=direct).init(start)
        losses, (gradient, head_gradients), _ = jax.jit(evaluate)(start, heads, state)
        assert gradient.dtype == losses.dtype == dtype
        assert head_gradients == heads
        # ½ (.5² + 10 · .2²) and ½ (10 · .5² + .8²), in the order of the losses.
        np.testing.assert_allclose(losses, [0.325, 1.57], rtol=1e-6)
        np.testing.assert_allclose(gradient, expected[direct], atol=3e-6)


@every_dtype
def test_worked_perturbation(dtype):
    with precision(dtype):
        steps = flat_perturbation(
            jnp.asarray(PLAIN, dtype), jnp.asarray(START, dtype), RHO
        )
        assert steps.dtype == dtype
        np.testing.assert_allclose(
            PLAIN + CURVATURES * np.asarray(steps), PERTURBED, atol=1e-6
        )


@pytest.mark.parametrize("adaptive", [False, True])
def test_each_task_is_normalised_alone(adaptive):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    sizes = np.array([1e-6, 1, 1e6, 0], np.float32)
    rows = jax.tree.map(
        lambda leaf: jnp.asarray(
            sizes.reshape((-1,) + (1,) * leaf.ndim)
            * rng.normal(size=(4, *leaf.shape)).astype(np.float32)
        ),
        params,
    )
    steps = flat_perturbation(rows, params, 0.3, adaptive)
    for k in range(4):
        g = np.concatenate([np.ravel(leaf[k]) for leaf in jax.tree.leaves(rows)])
        t = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
        length = np.linalg.norm(np.abs(t) * g if adaptive else g)
        expected = 0.3 * (t**2 * g if adaptive else g) / length if k < 3 else 0 * g
        step = np.concatenate([np.ravel(leaf[k]) for leaf in jax.tree.leaves(steps)])
        np.testing.assert_allclose(step, expected, rtol=2e-5)


def model(dtype):
    """A tanh layer and two heads of unlike shapes, with a batch."""
    rng = np.random.default_rng(1)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    shared = {"kernel": array(3, 4), "bias": array(4)}
    heads = {"sign": {"kernel": array(4)}, "size": {"kernel": array(4, 2)}}
    batch = (array(5, 3), array(5), array(5, 2))

    def features(shared, inputs):
        product = jnp.matmul(inputs, shared["kernel"], precision="highest")
        return jnp.tanh(product + shared["bias"][None])

    def sign(shared, head, inputs, signs, sizes):
        logits = jnp.matmul(
            features(shared, inputs), head["kernel"], precision="highest"
        )
        return jnp.mean(jax.nn.softplus(-logits * jnp.sign(signs)))

    def size(shared, head, inputs, signs, sizes):
        outputs = jnp.matmul(
            features(shared, inputs), head["kernel"], precision="highest"
        )
        return jnp.mean((outputs - sizes) ** 2)

    return {"sign": sign, "size": size}, shared, heads, batch


def climb(gradient, params, rho, adaptive):
    """The step uphill, in NumPy."""
    direction = jax.tree.map(
        lambda g, p: np.abs(p) * g if adaptive else np.asarray(g), gradient, params
    )
    length = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(direction)))
    return jax.tree.map(
        lambda p, d: p + rho * (np.abs(p) * d if adaptive else d) / length,
        params,
        direction,
    )


@pytest.mark.parametrize("adaptive", [False, True])
def test_trunk_and_heads_climb_apart(adaptive):
    with jax.enable_x64(True):
        losses, shared, heads, batch = model(np.float64)
        rho = 0.2
        evaluate = optim.flat_value_and_grad(
            losses, optim.sum(2), rho, adaptive=adaptive
        )
        state = optim.flat_regions(optim.sum(2)).init(shared)
        values, (gradient, head_gradients), _ = jax.jit(evaluate)(
            shared, heads, state, *batch
        )
        expected = jax.tree.map(jnp.zeros_like, shared)
        for k, (name, loss) in enumerate(losses.items()):
            slope = jax.jit(jax.grad(loss, (0, 1)))
            up = slope(shared, heads[name], *batch)
            point = climb(up[0], shared, rho, adaptive)
            head_point = climb(up[1], heads[name], rho, adaptive)
            down, head_gradient = slope(point, head_point, *batch)
            expected = jax.tree.map(jnp.add, expected, down)
            np.testing.assert_allclose(
                head_gradients[name]["kernel"], head_gradient["kernel"], rtol=1e-10
            )
            np.testing.assert_allclose(values[k], loss(shared, heads[name], *batch))
        for leaf in shared:
            np.testing.assert_allclose(gradient[leaf], expected[leaf], rtol=1e-10)


def test_inactive_task_is_absent():
    losses, shared, heads, batch = model(np.float32)
    aggregator = optim.sum(2)
    state = optim.flat_regions(aggregator).init(shared)
    evaluate = jax.jit(optim.flat_value_and_grad(losses, aggregator, 0.2))
    _, (gradient, head_gradients), _ = evaluate(
        shared, heads, state, *batch, active=jnp.array([False, True])
    )
    alone = {"size": losses["size"]}
    single = optim.sum(1)
    _, (expected, expected_heads), _ = jax.jit(
        optim.flat_value_and_grad(alone, single, 0.2)
    )(
        shared,
        {"size": heads["size"]},
        optim.flat_regions(single).init(shared),
        *batch,
    )
    for leaf in shared:
        np.testing.assert_allclose(gradient[leaf], expected[leaf], rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(head_gradients["sign"]["kernel"], 0)
    np.testing.assert_allclose(
        head_gradients["size"]["kernel"], expected_heads["size"]["kernel"], rtol=1e-5
    )


def test_flat_surroundings_leave_the_aggregator_itself():
    aggregator = compiled("mgda")
    separate = optim.flat_regions(aggregator)
    rows = jnp.asarray(PLAIN, jnp.float32)
    result, _ = separate.update(rows, separate.init(rows[0]), plain=rows)
    expected, _ = aggregator.update(rows, aggregator.init(rows[0]))
    np.testing.assert_array_equal(result, expected)


def test_aggregations_draw_and_remember_apart():
    aggregator = optim.flat_regions(compiled("pcgrad", 4))
    rng = np.random.default_rng(2)
    plain, flat = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    state = aggregator.init(plain[0])
    plain_state, flat_state = state
    assert not jnp.array_equal(
        jax.random.key_data(plain_state.key), jax.random.key_data(flat_state.key)
    )
    result, new_state = aggregator.update(plain + flat, state, plain=plain)
    inner = compiled("pcgrad", 4)
    down, plain_state = inner.update(plain, plain_state)
    level, flat_state = inner.update((plain + flat) - plain, flat_state)
    np.testing.assert_allclose(result, down + level, rtol=1e-5)
    for mine, other in ((new_state.plain, plain_state), (new_state.flat, flat_state)):
        np.testing.assert_allclose(mine.weights, other.weights, rtol=1e-5)
        np.testing.assert_array_equal(
            jax.random.key_data(mine.key), jax.random.key_data(other.key)
        )


def test_direct_keeps_the_state_and_result_of_the_aggregator():
    aggregator = compiled("pcgrad")
    direct = optim.flat_regions(aggregator, direct=True)
    rows = jnp.asarray(PERTURBED, jnp.float32)
    state = direct.init(rows[0])
    result, new_state = direct.update(rows, state, plain=rows)
    expected, expected_state = aggregator.update(rows, aggregator.init(rows[0]))
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(new_state.weights, expected_state.weights)


def test_bfloat16_parameters_keep_their_type():
    losses, shared, heads, batch = model(jnp.bfloat16)
    aggregator = optim.sum(2)
    state = optim.flat_regions(aggregator).init(shared)
    evaluate = jax.jit(optim.flat_value_and_grad(losses, aggregator, 0.2))
    _, (gradient, head_gradients), _ = evaluate(shared, heads, state, *batch)
    for leaf in jax.tree.leaves((gradient, head_gradients)):
        assert leaf.dtype == jnp.bfloat16
        assert jnp.all(jnp.isfinite(leaf))
    assert uphill(shared, shared, 1.0)["bias"].dtype == jnp.float32


def test_mistakes_are_explained():
    losses, shared, heads, batch = model(np.float32)
    aggregator = optim.sum(2)
    with pytest.raises(ValueError, match="rho is -1"):
        optim.flat_value_and_grad(losses, aggregator, -1)
    separate = optim.flat_regions(aggregator)
    rows = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="plain is None"):
        separate.update(rows, separate.init(rows[0]))
    with pytest.raises(ValueError, match=r"heads has \['sign'\]"):
        optim.flat_value_and_grad(losses, aggregator, 0.1)(
            shared, {"sign": heads["sign"]}, separate.init(shared), *batch
        )
