import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe import MoE
from mtl_jax.models import VisionTransformer

IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1)
TRUNK = functools.partial(
    VisionTransformer, width=8, depth=2, num_heads=2, patch_size=4, mlp_ratio=2
)
EXPERTS = functools.partial(
    MoE,
    num_experts=4,
    num_selected=2,
    expert_hidden=8,
    group_size=2,
    router_init=nn.initializers.normal(0.4),
)
TRUNKS = {
    "dense": TRUNK(),
    "one router": TRUNK(moe=EXPERTS),
    "a router a task": TRUNK(moe=EXPERTS, num_tasks=3),
}


@functools.cache
def parameters(kind):
    trunk = TRUNKS[kind]
    task = None if trunk.num_tasks is None else jnp.int32(0)
    init = jax.jit(lambda key: trunk.init(key, IMAGES, task, train=False))
    return nn.unbox(init(jax.random.key(1)))["params"]


@functools.partial(jax.jit, static_argnames=("trunk", "train"))
def apply(trunk, params, images, task, train=False):
    return trunk.apply(
        {"params": params},
        images,
        task,
        train=train,
        rngs={"router": jax.random.key(2)},
    )


def features(kind, images=IMAGES, task=None, params=None):
    params = parameters(kind) if params is None else params
    index = None if task is None else jnp.int32(task)
    return apply(TRUNKS[kind], params, images, index)


def task_of(kind):
    return None if TRUNKS[kind].num_tasks is None else 1


@pytest.mark.parametrize("kind", TRUNKS)
def test_features_lie_in_the_grid_of_patches(kind):
    output = features(kind, task=task_of(kind))
    assert output.shape == (2, 2, 3, 8)
    assert output.dtype == jnp.float32


def test_every_second_block_has_experts():
    assert "mlp" in parameters("one router")["block_0"]
    assert "moe" in parameters("one router")["block_1"]
    assert "moe" not in parameters("dense")["block_1"]


def test_routers_by_task_share_their_experts():
    shared, by_task = (
        parameters(kind)["block_1"]["moe"] for kind in ("one router", "a router a task")
    )
    assert by_task["router"].shape == (3, *shared["router"].shape)
    assert jax.tree.map(jnp.shape, by_task["experts"]) == jax.tree.map(
        jnp.shape, shared["experts"]
    )


def test_features_depend_on_the_task_through_its_router_alone():
    kind = "a router a task"
    outputs = [features(kind, task=k) for k in range(3)]
    assert not np.allclose(outputs[0], outputs[1])
    assert not np.allclose(outputs[1], outputs[2])
    params = jax.tree.map(lambda leaf: leaf, parameters(kind))
    router = params["block_1"]["moe"]["router"]
    params["block_1"]["moe"]["router"] = router.at[1].set(router[0])
    np.testing.assert_array_equal(
        features(kind, task=1, params=params), features(kind, task=0, params=params)
    )


def test_a_trunk_with_a_router_a_task_needs_the_task():
    with pytest.raises(ValueError, match="needs the index of the task"):
        features("a router a task")


@pytest.mark.parametrize("kind", TRUNKS)
def test_bytes_are_pixels_from_minus_one_to_one(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    floats = pixels.astype(np.float32) / 127.5 - 1
    task = task_of(kind)
    np.testing.assert_allclose(
        features(kind, jnp.array(pixels), task),
        features(kind, jnp.array(floats), task),
        rtol=1e-5,
        atol=1e-5,
    )


def test_grey_images_count_as_grey_in_every_channel():
    grey = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    repeated = jnp.array(np.repeat(grey, 3, axis=-1))
    np.testing.assert_allclose(
        features("dense", jnp.array(grey)), features("dense", repeated), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 8, 8, 2), "2 channels"), ((2, 10, 8, 3), "patch_size is 4")],
)
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        features("dense", jnp.zeros(shape))


def test_where_a_patch_lies_matters():
    swapped = IMAGES[:, :, ::-1].reshape(2, 8, 3, 4, 3)[:, :, :, ::-1]
    swapped = swapped.reshape(IMAGES.shape)
    # The same patches in other places: without positions, features would follow them.
    moved = features("dense", swapped)[:, :, ::-1]
    assert not np.allclose(moved, features("dense"), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "train"), [("dense", False), ("a router a task", True)]
)
def test_recomputed_blocks_give_the_same_values_and_gradients(kind, train):
    task = None if TRUNKS[kind].num_tasks is None else jnp.int32(1)

    def loss(params, trunk):
        output = apply(trunk, params, IMAGES, task, train)
        return jnp.sum(jnp.sin(output))

    evaluate = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = evaluate(parameters(kind), TRUNKS[kind])
    again = evaluate(parameters(kind), TRUNKS[kind].clone(remat=True))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        again,
        plain,
    )


def test_computing_in_bfloat16_keeps_float32_parameters():
    trunk = TRUNK(moe=EXPERTS, dtype=jnp.bfloat16)
    # Flax's layer norm takes its statistics in float32 by promoting implicitly.
    with jax.numpy_dtype_promotion("standard"):
        narrow = apply(trunk, parameters("one router"), IMAGES, None)
        params = jax.eval_shape(lambda key: trunk.init(key, IMAGES), jax.random.key(0))
    assert narrow.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    wide = np.asarray(features("one router"))
    # Eight bits of mantissa; a token that changes its expert differs by more, hence
    # the median.
    assert np.median(np.abs(narrow.astype(jnp.float32) - wide)) < 0.05
