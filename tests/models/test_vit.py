import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_vit import (
    ACTIVATIONS,
    attention,
    dense,
    float64,
    layer_norm,
    patches,
)

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.mlp import Mlp, SwiGlu, exact_gelu, quick_gelu
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.layers.patch import (
    PatchEmbedding,
    resize_positions,
    sincos_position_embedding,
)
from mtl_jax.models import VisionTransformer
from mtl_jax.models.multitask import layer_statistics

KEY = jax.random.key(5)
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
    router=functools.partial(
        NoisyTopK,
        gate=functools.partial(Gate, kernel_init=nn.initializers.normal(0.4)),
    ),
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
    assert by_task["router"]["gate"]["kernel"].shape == (
        3,
        *shared["router"]["gate"]["kernel"].shape,
    )
    assert jax.tree.map(jnp.shape, by_task["experts"]) == jax.tree.map(
        jnp.shape, shared["experts"]
    )


def test_features_depend_on_the_task_through_its_router_alone():
    kind = "a router a task"
    outputs = [features(kind, task=k) for k in range(3)]
    assert not np.allclose(outputs[0], outputs[1])
    assert not np.allclose(outputs[1], outputs[2])
    params = jax.tree.map(lambda leaf: leaf, parameters(kind))
    router = params["block_1"]["moe"]["router"]["gate"]["kernel"]
    params["block_1"]["moe"]["router"]["gate"]["kernel"] = router.at[1].set(router[0])
    np.testing.assert_array_equal(
        features(kind, task=1, params=params), features(kind, task=0, params=params)
    )


@pytest.mark.parametrize("fields", [{}, {"remat": True}, {"scan": True, "depth": 4}])
@pytest.mark.parametrize(
    ("num_tasks", "task", "message"),
    [
        (3, None, "task=None does not fit num_tasks=3"),
        (3, 3, "task=3 is not one of num_tasks=3"),
        (3, np.int32(-1), "task=-1 is not one of num_tasks=3"),
        (None, 0, "task=0 does not fit num_tasks=None"),
    ],
)
def test_the_task_must_be_one_of_the_trunk(fields, num_tasks, task, message):
    trunk = TRUNK(moe=EXPERTS, num_tasks=num_tasks, **fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: trunk.init(jax.random.key(1), IMAGES, task))


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


PUBLISHED = {
    "plain": TRUNK(),
    "class token and positions": TRUNK(
        class_token="appended",
        position_grid=(2, 3),
        mlp=functools.partial(Mlp, activation=exact_gelu),
        norm_epsilon=1e-3,
        mlp_ratio=2.4,
    ),
    "norm before the blocks, quick": TRUNK(
        class_token="inside",
        position_grid=(2, 3),
        embedding=functools.partial(
            PatchEmbedding, use_bias=False, mean=(0.4,), std=(0.3, 0.2, 0.1)
        ),
        mlp=functools.partial(Mlp, activation=quick_gelu),
        pre_norm=True,
    ),
    "registers, scales and gates": TRUNK(
        class_token="inside",
        num_registers=2,
        position_grid=(2, 3),
        layer_scale=0.5,
        mlp=SwiGlu,
    ),
    "no biases, no last norm": TRUNK(
        num_registers=1,
        attention=functools.partial(SelfAttention, qkv_bias=False, output_bias=False),
        final_norm=False,
    ),
}


def published_parameters(trunk):
    params = nn.unbox(jax.eval_shape(trunk.init, jax.random.key(0), IMAGES))["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten(
        0.5 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    )


def oracle(trunk, params, image):
    """All tokens of one image after the trunk, in float64."""
    embedding = getattr(trunk.embedding, "keywords", {})
    mean, std = (np.array(embedding.get(name, (0.5,))) for name in ("mean", "std"))
    x = patches(((image + 1) / 2 - mean) / std, trunk.patch_size)
    x = dense(x, params["embedding"]["projection"])
    if trunk.position_grid:
        x = x + params["positions"].reshape(x.shape)
    else:
        positions = sincos_position_embedding(2, 3, trunk.width)
        x = x + positions.reshape(x.shape)
    extra = [params[name] for name in ("class_token", "registers") if name in params]
    x = np.concatenate([*extra, x])
    norm = functools.partial(layer_norm, epsilon=trunk.norm_epsilon)
    if trunk.pre_norm:
        x = norm(x, params["pre_norm"])
    for i in range(trunk.depth):
        block = params[f"block_{i}"]
        y = attention(norm(x, block["attention_norm"]), **block["attention"])
        x = x + y * block.get("attention_scale", 1.0)
        y = norm(x, block["mlp_norm"])
        mlp = block["mlp"]
        if trunk.mlp is SwiGlu:
            gate = dense(y, mlp["gate"])
            y = dense(gate / (1 + np.exp(-gate)) * dense(y, mlp["up"]), mlp["down"])
        else:
            activation = {exact_gelu: "exact", quick_gelu: "quick"}.get(
                getattr(trunk.mlp, "keywords", {}).get("activation"), "tanh"
            )
            y = dense(ACTIVATIONS[activation](dense(y, mlp["up"])), mlp["down"])
        x = x + y * block.get("mlp_scale", 1.0)
    return norm(x, params["norm"]) if trunk.final_norm else x


@pytest.mark.parametrize("kind", PUBLISHED)
def test_what_published_trunks_have_against_float64(kind):
    trunk = PUBLISHED[kind]
    params = published_parameters(trunk)
    actual = np.asarray(apply(trunk, params, IMAGES, None))
    for image, features in zip(np.asarray(IMAGES), actual, strict=True):
        expected = oracle(trunk, float64(params), np.float64(image))
        grid = expected[-6:].reshape(2, 3, 8)
        np.testing.assert_allclose(features[..., :8], grid, rtol=1e-4, atol=2e-5)
        if trunk.class_token == "appended":
            tokens = features[..., 8:].reshape(6, 8)
            np.testing.assert_allclose(
                tokens, np.tile(expected[0], (6, 1)), rtol=1e-4, atol=2e-5
            )
        else:
            assert features.shape == grid.shape


def test_learned_positions_serve_images_of_other_sizes():
    trunk = PUBLISHED["class token and positions"].clone(position_grid=(3, 2))
    params = published_parameters(trunk)
    output = apply(trunk, params, IMAGES, None)
    # As if they had been resized once and for all.
    resized = resize_positions(params["positions"], 2, 3)
    fitted = trunk.clone(position_grid=(2, 3))
    expected = apply(fitted, params | {"positions": resized}, IMAGES, None)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_hidden_units_are_a_ratio_of_the_width_rounded():
    trunk = PUBLISHED["class token and positions"]
    block = published_parameters(trunk)["block_0"]
    assert block["mlp"]["up"]["kernel"].shape == (8, 19)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("class_token", True, "class_token is True; use"),
        ("num_registers", -1, "num_registers is -1; it must be at least 0"),
        ("position_grid", (0, 3), "position_grid is .0, 3.; it must be at least 1x1"),
    ],
)
def test_fields_of_published_trunks_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        TRUNK(**{field: value}).init(jax.random.key(0), IMAGES)


def test_what_is_learned_at_tokens_has_logical_axes():
    trunk = PUBLISHED["registers, scales and gates"]
    params = trunk.init(jax.random.key(0), IMAGES)["params"]
    assert params["positions"].names == ("tokens", None, "embed")
    assert params["class_token"].names == ("tokens", "embed")
    assert params["registers"].names == ("tokens", "embed")
    scale = params["block_1"]["mlp_scale"]
    assert scale.names == ("embed",)
    assert scale.value.tolist() == [0.5] * 8


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_scanned_blocks_compute_what_others_do(remat):
    plain = TRUNK(depth=4, moe=EXPERTS, num_tasks=3)
    scanned = plain.clone(scan=True, remat=remat)
    assert scanned.period == 2
    init = jax.jit(lambda key: plain.init(key, IMAGES, jnp.int32(0)))
    params = nn.unbox(init(jax.random.key(1)))["params"]
    blocks = {
        f"block_{j}": jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(params[f"block_{i + j}"] for i in (0, 2)),
        )
        for j in (0, 1)
    }
    stacked = {k: v for k, v in params.items() if not k.startswith("block")}
    stacked["blocks"] = blocks
    shapes = jax.eval_shape(lambda key: scanned.init(key, IMAGES, jnp.int32(0)), KEY)
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)["params"]) == jax.tree.map(
        jnp.shape, stacked
    )
    kernel = shapes["params"]["blocks"]["block_1"]["moe"]["experts"]["up"]["kernel"]
    assert kernel.names == ("layers", "expert", "embed", "mlp")

    def value_and_gradient(trunk, params):
        def loss(params):
            features, sown = trunk.apply(
                {"params": params},
                IMAGES,
                jnp.int32(1),
                mutable=["losses", "statistics"],
            )
            auxiliary = sum(jnp.sum(x) for x in jax.tree.leaves(sown["losses"]))
            statistics = layer_statistics(sown["statistics"], trunk.period)
            return jnp.sum(jnp.sin(features)) + auxiliary, statistics

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (expected, layers), gradient = value_and_gradient(plain, params)
    (actual, scanned_layers), scanned_gradient = value_and_gradient(scanned, stacked)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert set(layers) == {"block_1", "block_3"}
    for name in layers:
        np.testing.assert_allclose(
            scanned_layers[name]["load"], layers[name]["load"], atol=1e-6
        )
    for i in (0, 2):
        for j in (0, 1):
            jax.tree.map(
                lambda ours, theirs, i=i: np.testing.assert_allclose(
                    ours[i // 2], theirs, rtol=1e-3, atol=1e-5
                ),
                scanned_gradient["blocks"][f"block_{j}"],
                gradient[f"block_{i + j}"],
            )


def test_depth_that_does_not_repeat():
    with pytest.raises(ValueError, match="depth=3 is no multiple of the 2 blocks"):
        TRUNK(depth=3, moe=EXPERTS, scan=True).init(KEY, IMAGES)
