import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.heads import Classification, DensePrediction
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.models import MultitaskModel, VisionTransformer
from mtl_jax.models.multitask import repeat

IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
HEADS = {
    "surface": DensePrediction(patch_size=4, num_classes=2, hidden=8),
    "height": DensePrediction(patch_size=4, hidden=8),
    "digit": Classification(num_classes=10),
}
TASKS = tuple(HEADS)
EXPERTS = functools.partial(
    MoE,
    num_experts=4,
    num_selected=2,
    expert_hidden=8,
    group_size=2,
    router=functools.partial(
        NoisyTopK,
        gate=functools.partial(Gate, kernel_init=nn.initializers.normal(0.4)),
    ),
)
TRUNK = functools.partial(
    VisionTransformer, width=8, depth=2, num_heads=2, patch_size=4, mlp_ratio=2
)
CONDITIONED = MultitaskModel(TRUNK(moe=EXPERTS, num_tasks=3), HEADS)
SHARED = MultitaskModel(TRUNK(moe=EXPERTS), HEADS)
DENSE = MultitaskModel(TRUNK(), HEADS)
MODELS = pytest.mark.parametrize(
    "model", [CONDITIONED, SHARED, DENSE], ids=["conditioned", "shared", "dense"]
)


@functools.cache
def parameters_of(trunk):
    shape = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    init = jax.jit(
        lambda key: MultitaskModel(trunk, HEADS).init(key, dict.fromkeys(TASKS, shape))
    )
    return nn.unbox(init(jax.random.key(1)))


def parameters(model):
    return parameters_of(model.trunk)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def apply_trunk(trunk, copies, tasks, train, key):
    model = MultitaskModel(trunk, HEADS)
    return model.apply_trunk(copies, IMAGES, tasks, train=train, key=key)


def run(model, copies, tasks=TASKS, train=True, seed=3):
    return apply_trunk(model.trunk, copies, tasks, train, jax.random.key(seed))


def run_all(model, **options):
    copies = repeat(parameters(model)["trunk"], model.num_passes(TASKS))
    return run(model, copies, **options)


@MODELS
def test_the_passes_are_one_or_one_a_task(model):
    passes = 3 if model is CONDITIONED else 1
    assert model.task_conditioned == (model is CONDITIONED)
    assert model.num_passes(TASKS) == passes
    assert model.num_passes(TASKS[1:2]) == 1
    output = run_all(model)
    assert output.features.shape == (passes, 2, 2, 2, 8)
    assert output.auxiliary_loss.shape == (passes,)
    if model is DENSE:
        assert output.statistics == {}
        assert output.auxiliary_loss.tolist() == [0.0]
    else:
        assert set(output.statistics) == {"block_1"}
        load = output.statistics["block_1"]["load"]
        assert load.shape == (passes, 4)
        np.testing.assert_allclose(load.sum(axis=1), 1.0, rtol=1e-6)
        assert (np.asarray(output.auxiliary_loss) > 0).all()


@MODELS
def test_a_pass_is_the_trunk_alone(model):
    features = run_all(model, train=False).features
    variables = {"params": parameters(model)["trunk"]}
    apply = jax.jit(model.trunk.apply)
    for k in range(len(features)):
        task = jnp.int32(k) if model is CONDITIONED else None
        alone = apply(variables, IMAGES, task)
        np.testing.assert_allclose(features[k], alone, rtol=1e-5, atol=1e-5)


def test_tasks_may_come_in_any_order_and_number():
    params = parameters(CONDITIONED)["trunk"]
    some = run(CONDITIONED, repeat(params, 2), ("digit", "surface")).features
    # The noise of a router belongs to its task, so training features agree too.
    every = run_all(CONDITIONED).features
    np.testing.assert_allclose(some, every[jnp.array([2, 0])], rtol=1e-5, atol=1e-5)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="moon"):
        run(CONDITIONED, repeat(parameters(CONDITIONED)["trunk"], 1), ("moon",))


def test_noise_needs_training_and_follows_the_key():
    noisy = [run_all(CONDITIONED, seed=seed).features for seed in (3, 3, 4)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2])
    clean = [run_all(CONDITIONED, train=False, seed=s).features for s in (3, 4)]
    np.testing.assert_array_equal(*clean)


@pytest.mark.parametrize("model", [CONDITIONED, SHARED], ids=["conditioned", "shared"])
def test_gradients_of_the_copies_are_the_gradients_by_task(model):
    params = parameters(model)
    # Heads that start at zero would hide the trunk from its gradient.
    heads = jax.tree.map(lambda leaf: leaf + 0.1, params["heads"])
    tasks = ("digit", "surface") if model is CONDITIONED else ("height",)

    def task_loss(features, task):
        prediction = model.apply_head(heads[task], features, task)
        return jnp.sum(jnp.sin(prediction + 1.0))

    def together(copies):
        output = run(model, copies, tasks)
        losses = [task_loss(output.features[k], task) for k, task in enumerate(tasks)]
        return sum(losses) + jnp.sum(output.auxiliary_loss)

    def alone(trunk, task):
        output = run(model, repeat(trunk, 1), (task,))
        return task_loss(output.features[0], task) + output.auxiliary_loss[0]

    found = jax.jit(jax.grad(together))(repeat(params["trunk"], len(tasks)))
    for k, task in enumerate(tasks):
        expected = jax.jit(jax.grad(alone), static_argnums=1)(params["trunk"], task)
        jax.tree.map(
            lambda row, reference, k=k: np.testing.assert_allclose(
                row[k], reference, rtol=1e-4, atol=1e-5
            ),
            found,
            expected,
        )
    if model is CONDITIONED:
        # A task's pass teaches its own router and no other.
        router = np.asarray(found["block_1"]["moe"]["router"]["gate"]["kernel"])
        taught = np.any(router, axis=(2, 3))
        assert taught.tolist() == [[False, False, True], [True, False, False]]


def test_repeat_adds_an_axis_of_copies():
    copies = repeat({"a": jnp.arange(3.0), "b": jnp.float32(2.0)}, 4)
    np.testing.assert_array_equal(copies["a"], np.tile(np.arange(3.0), (4, 1)))
    assert copies["b"].tolist() == [2.0] * 4


def test_images_of_several_sizes_share_one_trunk():
    grey = jax.ShapeDtypeStruct((2, 12, 12, 1), jnp.dtype("uint8"))
    colour = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.dtype("uint8"))
    inputs = {"digit": grey, "surface": colour, "height": colour}
    params = jax.eval_shape(
        lambda key: nn.unbox(CONDITIONED.init(key, inputs)), jax.random.key(0)
    )
    assert set(params["heads"]) == set(TASKS)
    shapes = jax.tree.map(lambda leaf: leaf.shape, params["trunk"])
    assert shapes == jax.tree.map(jnp.shape, parameters(CONDITIONED)["trunk"])


def test_heads_start_differently():
    first, second = (
        parameters(CONDITIONED)["heads"][task]["hidden_layer"]["kernel"]
        for task in ("surface", "height")
    )
    assert not np.allclose(first, second)
