"""Models of one task compute what the model of all tasks did, with fewer experts."""

import functools

import jax
import numpy as np
import pytest
from small_experts import (
    IMAGES,
    TASKS,
    heads_of_experts,
    inputs,
    model,
    predict,
    variables,
)

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import LossFree
from mtl_jax.models.experts import (
    expert_layers,
    expert_usage,
    extract,
    kept_experts,
)
from mtl_jax.models.experts.extract import extracted_trunk


@pytest.fixture(scope="module")
def whole():
    """The model, its parameters and collections, and how one task uses it."""
    made = model(attention=heads_of_experts(), num_experts=8, task_embedding=True)
    params, collections = variables(made)
    usage = expert_usage(made, params, "second", [IMAGES[:3], IMAGES[3:]], collections)
    return made, params, collections, usage


def test_usage_is_what_the_tokens_of_the_task_choose(whole):
    made, params, collections, usage = whole
    assert list(usage) == ["block_0_attention", "block_1"]
    for layer, used in usage.items():
        experts = 8 if layer == "block_1" else 4
        assert used.shape == (experts,)
        np.testing.assert_allclose(used.sum(), 2, rtol=1e-6)
        # Fractions of 4 images of 4 tokens.
        np.testing.assert_allclose(used * 16, np.round(used * 16), atol=1e-5)

    # By hand for the first layer: what its router sees is no other layer's business.
    @jax.jit
    def first_norm(params, collections):
        _, state = made.trunk.apply(
            {"params": params["trunk"], **collections},
            IMAGES,
            1,
            capture_intermediates=lambda module, _: module.name == "attention_norm",
            mutable=["intermediates"],
        )
        return state["intermediates"]["block_0"]["attention_norm"]["__call__"][0]

    tokens = np.float64(first_norm(params, collections))
    router = params["trunk"]["block_0"]["attention"]["router"]["gate"]["kernel"][1]
    bias = collections["balance"]["block_0"]["attention"]["router"]["bias"][1]
    scores = 1 / (1 + np.exp(-tokens @ np.float64(router))) + np.float64(bias)
    chosen = np.argsort(-scores, axis=-1)[..., :2]
    counted = np.bincount(chosen.ravel(), minlength=4) / 16
    np.testing.assert_allclose(usage["block_0_attention"], counted, atol=1e-6)


def test_what_is_not_used_can_go(whole):
    made, params, collections, usage = whole
    kept = kept_experts(made.trunk, usage, threshold=0.0)
    assert len(kept["block_1"]) < 8
    small = extract(made, params, "second", kept, inputs(), collections)
    wanted = predict(made, params, "second", collections)
    actual = predict(small.model, small.params, "second", small.collections)
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    assert list(small.params["heads"]) == ["second"]
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(p)) for p in (params, small.params)
    ]
    assert sizes[1] < sizes[0]
    layers = {
        layer.name: layer.num_experts for layer in expert_layers(small.model.trunk)
    }
    assert layers == {name: len(indices) for name, indices in kept.items()}


@pytest.fixture(scope="module")
def grown():
    """A model whose last task alone sees all experts, in both kinds of layers."""
    gate = functools.partial(Gate, visible_experts=(3, 3, 5))
    router = functools.partial(LossFree, gate=gate)
    heads = functools.partial(heads_of_experts(5)[0], router=router)
    made = model(num_experts=5, router=router, attention=(heads, SelfAttention))
    return made, *variables(made)


@pytest.mark.parametrize(
    ("task", "indices", "visible"),
    [("third", [0, 2, 4], 3), ("second", [0, 2], 2), ("second", [1, 2, 4], 2)],
)
def test_a_task_of_a_grown_model_sees_what_is_kept_of_what_it_saw(
    grown, task, indices, visible
):
    made, params, collections = grown
    kept = {layer.name: np.array(indices) for layer in expert_layers(made.trunk)}
    small = extract(made, params, task, kept, inputs(), collections)
    layers = expert_layers(small.model.trunk)
    assert [layer.name for layer in layers] == ["block_0_attention", "block_1"]
    assert {layer.visible_experts for layer in layers} == {(visible,)}
    assert {layer.num_experts for layer in layers} == {len(indices)}


def test_a_task_of_a_grown_model_predicts_the_same(grown):
    made, params, collections = grown
    # All that the task sees; the weights of LossFree are renormalised.
    kept = {layer.name: np.arange(3) for layer in expert_layers(made.trunk)}
    small = extract(made, params, "second", kept, inputs(), collections)
    np.testing.assert_allclose(
        predict(small.model, small.params, "second", small.collections),
        predict(made, params, "second", collections),
        rtol=1e-5,
        atol=1e-5,
    )


def test_parameters_are_those_of_the_experts_and_of_the_task(whole):
    made, params, collections, usage = whole
    kept = kept_experts(made.trunk, usage, threshold=0.9)
    small = extract(made, params, "second", kept, inputs(), collections)
    old, new = (
        params["trunk"]["block_1"]["moe"],
        small.params["trunk"]["block_1"]["moe"],
    )
    indices = kept["block_1"]
    np.testing.assert_array_equal(
        new["experts"]["up"]["kernel"],
        np.asarray(old["experts"]["up"]["kernel"])[indices],
    )
    np.testing.assert_array_equal(
        new["router"]["gate"]["kernel"],
        np.asarray(old["router"]["gate"]["kernel"])[1:2][..., indices],
    )
    np.testing.assert_array_equal(
        small.params["trunk"]["task_embedding"], params["trunk"]["task_embedding"][1:2]
    )


def test_at_least_as_many_as_a_token_goes_to():
    trunk = model().trunk
    usage = {"block_1": np.array([0.01, 0.99, 0.05, 0.95])}
    assert list(kept_experts(trunk, usage, 0.03)["block_1"]) == [1, 2, 3]
    assert list(kept_experts(trunk, usage, 0.97)["block_1"]) == [1, 3]
    with pytest.raises(ValueError, match="threshold is 3; it must be at least 0"):
        kept_experts(trunk, usage, 3)


def test_a_task_that_is_not_there(whole):
    made, params, collections, usage = whole
    kept = kept_experts(made.trunk, usage)
    with pytest.raises(ValueError, match=r"'fourth', but .* for \['first', 'second'"):
        extract(made, params, "fourth", kept, inputs(), collections)
    with pytest.raises(ValueError, match="no batches"):
        expert_usage(made, params, TASKS[0], [], collections)


def test_a_trunk_that_is_extracted_again(whole):
    made, _, _, usage = whole
    once = extracted_trunk(made.trunk, kept_experts(made.trunk, usage, 0.0), 1)
    few = {layer.name: np.arange(2) for layer in expert_layers(once)}
    assert extracted_trunk(once, few, 0)
