import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.heads import Classification, DensePrediction
from mtl_jax.layers.moe import MoE, MoeAttention
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import ExpertChoice, M3ViT
from mtl_jax.models import MultitaskModel, VisionTransformer
from mtl_jax.models.experts import expert_usage
from mtl_jax.models.inference import (
    MissingExpertError,
    Predictor,
    first_choices,
    place_params,
    predict,
    single_examples,
    task_features,
    used_experts,
)
from mtl_jax.models.multitask import repeat

IMAGES = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1)
HEADS = {
    "surface": DensePrediction(patch_size=4, num_classes=2, hidden=8),
    "height": DensePrediction(patch_size=4, hidden=8),
    "digit": Classification(num_classes=10),
}
EXPERTS = functools.partial(
    MoE,
    num_experts=16,
    num_selected=2,
    expert_hidden=8,
    group_size=2,
    capacity_factor=None,
    router=functools.partial(
        M3ViT, gate=functools.partial(Gate, kernel_init=nn.initializers.normal(2.0))
    ),
)
TRUNK = functools.partial(
    VisionTransformer, width=8, depth=2, num_heads=2, patch_size=4, mlp_ratio=2
)
MODEL = MultitaskModel(TRUNK(moe=(EXPERTS,), num_tasks=3), HEADS)


@functools.cache
def parameters():
    shape = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    init = jax.jit(lambda key: MODEL.init(key, dict.fromkeys(HEADS, shape)))
    return nn.unbox(init(jax.random.key(1)))


@functools.cache
def plain(task):
    """What the model predicts with the ordinary forward pass."""

    @jax.jit
    def apply(params):
        trunk = repeat(params["trunk"], 1)
        output = MODEL.apply_trunk(trunk, IMAGES, (task,), train=False)
        return MODEL.apply_head(params["heads"][task], output.features[0], task)

    return apply(parameters())


@functools.cache
def usage(task):
    return expert_usage(MODEL, parameters(), task, [IMAGES, IMAGES])


def place(tasks, resident, **options):
    return Predictor(MODEL, place_params(parameters(), tasks, resident, **options))


@functools.cache
def streamed():
    return place(HEADS, {})


def test_streamed_and_partly_resident_models_predict_as_the_plain_one():
    resident = {"block_0": (0, 5), "block_1": range(16)}
    for predictor in (streamed(), place(HEADS, resident)):
        for task in HEADS:
            np.testing.assert_allclose(
                predictor(IMAGES, task), plain(task), rtol=1e-5, atol=1e-5
            )


def test_the_pure_function_predicts_the_same():
    prediction = jax.jit(functools.partial(predict, MODEL), static_argnums=2)(
        parameters(), IMAGES, "height"
    )
    np.testing.assert_allclose(prediction, plain("height"), atol=1e-5)


def test_the_experts_that_were_measured_suffice():
    tasks = ("height", "digit")
    resident = used_experts(map(usage, tasks))
    # Or nothing would be left out.
    assert sum(map(len, resident.values())) < 32
    predictor = place(tasks, resident, others="nowhere")
    for task in tasks:
        np.testing.assert_allclose(
            predictor(IMAGES, task), plain(task), rtol=1e-5, atol=1e-5
        )


def test_what_was_measured_can_be_placed_beside_layers_that_lack_no_expert():
    """Attention of experts, and a router that fills the buffers of all of them."""
    attention = functools.partial(
        MoeAttention, num_experts=4, router=EXPERTS.keywords["router"]
    )
    filled = functools.partial(EXPERTS, num_experts=4, router=ExpertChoice)
    trunk = TRUNK(
        moe=(EXPERTS, filled), attention=(attention, SelfAttention), num_tasks=3
    )
    model = MultitaskModel(trunk, {"digit": HEADS["digit"]})
    shape = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), {"digit": shape}))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.float32(rng.normal(size=leaf.shape)), nn.unbox(shapes)
    )
    measured = expert_usage(model, params, "digit", [IMAGES])
    assert "block_0_attention" in measured

    resident = used_experts([measured])
    assert set(resident) == {"block_0", "block_1"}
    assert len(resident["block_0"]) < 16
    placed = place_params(params, ("digit",), resident, others="nowhere")
    assert np.isfinite(Predictor(model, placed)(IMAGES, "digit")).all()
    with pytest.raises(ValueError, match="block_1/moe fills the buffers of all expe"):
        Predictor(model, place_params(params, ("digit",), {}))(IMAGES, "digit")


def test_usage_is_the_share_of_the_routers_choices():
    features = jax.jit(functools.partial(task_features, MODEL))
    _, statistics = features(parameters()["trunk"], IMAGES, 1)
    for block, used in usage("height").items():
        # Each patch goes to two experts.
        np.testing.assert_allclose(used, 2 * statistics[block]["load"], atol=1e-7)
        assert used.sum() == pytest.approx(2)


def test_the_fewest_experts_that_cover_the_assignments_are_chosen():
    first = {"block_0": np.array([0.5, 0.0, 0.3, 0.2])}
    second = {"block_0": np.array([0.1, 0.0, 0.0, 0.9])}
    assert used_experts([first]) == {"block_0": (0, 2, 3)}
    assert used_experts([first], 0.8) == {"block_0": (0, 2)}
    assert used_experts([first], 0.81) == {"block_0": (0, 2, 3)}
    assert used_experts([first, second], 0.5) == {"block_0": (0, 3)}


def test_a_patch_that_wants_what_was_left_out_is_an_error():
    resident = used_experts([usage("surface")]) | {"block_1": ()}
    predictor = place(("surface",), resident, others="nowhere")
    with pytest.raises(MissingExpertError, match=r"sent 64 patches in block_1"):
        predictor(IMAGES, "surface")


def test_switching_tasks_compiles_nothing_and_moves_nothing():
    predictor = streamed()
    params, images = predictor.params["trunk"], jax.device_put(IMAGES)
    indices = [jax.device_put(np.int32(i)) for i in range(3)]
    predictor.trunk(params, images, indices[0])
    compiled = predictor.trunk._cache_size()
    with jax.transfer_guard("disallow_explicit"):
        for index in indices:
            predictor.trunk(params, images, index)
        assert predictor.trunk._cache_size() == compiled
        # The guard is on duty.
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            predictor.trunk(params, images, np.int32(1))


def test_only_what_the_tasks_need_is_on_the_device():
    params = place_params(parameters(), ("digit",), {"block_0": (2,)})
    assert set(params["heads"]) == {"digit"}
    one = sum(
        leaf[0].size
        for leaf in jax.tree.leaves(parameters()["trunk"]["block_0"]["moe"]["experts"])
    )
    sizes = {"device": 0, "pinned_host": 0}
    for block in ("block_0", "block_1"):
        experts = params["trunk"][block]["moe"]["experts"]
        for leaf in jax.tree.leaves((experts.resident, experts.waiting)):
            sizes[leaf.sharding.memory_kind] += leaf.size
    assert sizes == {"device": one, "pinned_host": 31 * one}


def test_models_without_capacity_take_any_batch():
    predictor = Predictor(
        single_examples(MODEL), place_params(parameters(), ("digit",), {})
    )
    np.testing.assert_allclose(
        predictor(IMAGES[:1], "digit"), plain("digit")[:1], atol=1e-5
    )
    limited = functools.partial(EXPERTS, capacity_factor=1.0)
    filled = functools.partial(EXPERTS, router=ExpertChoice)
    roomy = functools.partial(limited, evaluation_capacity_factor=None)
    judged = functools.partial(EXPERTS, evaluation_capacity_factor=1.0)
    trunk = TRUNK(moe=(None, EXPERTS, limited, filled, roomy, judged))
    sizes = [
        make and make().group_size
        for make in single_examples(MultitaskModel(trunk, HEADS)).trunk.moe
    ]
    assert sizes == [None, 1, 2, 2, 1, 2]
    dense = MultitaskModel(TRUNK(), HEADS)
    assert single_examples(dense) is dense


@pytest.mark.parametrize("fields", [{}, {"class_token": "inside", "remat": True}])
def test_first_choices_are_the_largest_logits_of_each_patch(fields):
    model = MultitaskModel(TRUNK(moe=(None, EXPERTS), num_tasks=3, **fields), HEADS)
    init = jax.jit(functools.partial(model.trunk.init, train=False))
    params = nn.unbox(init(jax.random.key(1), IMAGES, 0))["params"]

    @jax.jit
    def both(params):
        logits = []

        def keep(call, arguments, keywords, context):
            output = call(*arguments, **keywords)
            if isinstance(context.module, Gate) and context.method_name == "__call__":
                logits.append(output)
            return output

        with nn.intercept_methods(keep):
            model.trunk.clone(remat=False).apply({"params": params}, IMAGES, 2)
        return first_choices(model, params, IMAGES, 2), logits

    chosen, (logits,) = both(params)
    largest = jnp.argmax(logits.reshape(2, -1, 16), axis=-1)
    assert list(chosen) == ["block_1"]
    np.testing.assert_array_equal(chosen["block_1"], largest[:, -16:].reshape(2, 4, 4))
    assert len(np.unique(largest)) > 2


def test_first_choices_of_attention():
    attention = functools.partial(
        MoeAttention, num_experts=8, head_width=4, router=EXPERTS.keywords["router"]
    )
    model = MultitaskModel(
        TRUNK(depth=1, moe=(None,), attention=attention, num_tasks=3), HEADS
    )
    init = jax.jit(functools.partial(model.trunk.init, train=False))
    params = nn.unbox(init(jax.random.key(1), IMAGES, 0))["params"]

    @jax.jit
    def both(params):
        _, kept = model.trunk.apply(
            {"params": params},
            IMAGES,
            2,
            capture_intermediates=lambda module, _: module.name == "attention_norm",
            mutable=["intermediates"],
        )
        tokens = kept["intermediates"]["block_0"]["attention_norm"]["__call__"][0]
        return first_choices(model, params, IMAGES, 2), tokens

    chosen, tokens = both(params)
    kernel = params["block_0"]["attention"]["router"]["gate"]["kernel"][2]
    logits = np.matmul(np.asarray(tokens, np.float64), np.asarray(kernel, np.float64))
    largest = np.argmax(logits, axis=-1)
    assert list(chosen) == ["block_0_attention"]
    np.testing.assert_array_equal(chosen["block_0_attention"], largest.reshape(2, 4, 4))
    assert len(np.unique(largest)) > 2


def test_shares_are_of_assignments():
    # Each token goes to two: 1, 0.5 and 0.5 of the tokens are shares 1/2, 1/4 and 1/4.
    usage = {"block_1": np.array([0.5, 1.0, 0.0, 0.5])}
    assert used_experts([usage], 0.5) == {"block_1": (1,)}
    assert used_experts([usage], 0.6) == {"block_1": (0, 1)}
    assert used_experts([usage], 1.0) == {"block_1": (0, 1, 3)}


def test_mistakes_are_explained():
    params = parameters()
    with pytest.raises(ValueError, match="names 'depth', but the parameters have"):
        place_params(params, ("depth",), {})
    with pytest.raises(ValueError, match="names block 'block_2', but blocks with exp"):
        place_params(params, ("digit",), {"block_2": (0,)})
    with pytest.raises(ValueError, match="scan=False"):
        place_params({"trunk": {"blocks": {}}, "heads": {}}, (), {})
    with pytest.raises(ValueError, match="coverage is 0"):
        used_experts([usage("digit")], 0)
    with pytest.raises(ValueError, match=r"'block_0_attention', but .* cannot be left"):
        place_params(params, ("digit",), {"block_0_attention": (0,), "block_1": (0,)})
    with pytest.raises(ValueError, match="the parameters were placed for"):
        place(("digit",), {})(IMAGES, "height")
    assert jnp.isfinite(plain("digit")).all()


def test_a_task_that_the_model_does_not_have_is_named_beside_those_it_has():
    params = parameters()
    message = (
        r"task is 'zz', but the model has heads for \['surface', 'height', 'digit'"
    )
    for ask in (
        lambda: predict(MODEL, params, IMAGES, "zz"),
        lambda: expert_usage(MODEL, params, "zz", [IMAGES]),
        lambda: streamed()(IMAGES, "zz"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
