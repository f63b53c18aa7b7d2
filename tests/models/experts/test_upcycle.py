"""Experts that start as a dense model's perceptrons compute what it did."""

import functools

import jax
import numpy as np
import pytest
from small_experts import TASKS, model, predict, variables

from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.models.experts import upcycle


def made(**fields):
    """An upcycled model, its parameters and collections, and the dense one."""
    scan = fields.get("scan", False)
    dense = model(num_experts=0, scan=scan)
    dense_params, _ = variables(dense, seed=2)
    sparse = model(**fields)
    params, collections = variables(sparse)
    return sparse, upcycle(params, dense_params), collections, dense, dense_params


@pytest.mark.parametrize("scan", [False, True])
def test_with_renormalised_weights_the_output_is_that_of_the_dense_model(scan):
    sparse, params, collections, dense, dense_params = made(scan=scan)
    actual = predict(sparse, params, "second", collections)
    wanted = predict(dense, dense_params, "second")
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


def test_weights_that_are_not_renormalised_scale_the_branch():
    router = functools.partial(NoisyTopK, noise_std=0.0)
    sparse, params, _, dense, dense_params = made(router=router)
    # A gate of zeros gives 2 of 4 experts a quarter each: the branch is half itself.
    gate = params["trunk"]["block_1"]["moe"]["router"]["gate"]
    gate["kernel"] = np.zeros_like(gate["kernel"])
    halved = dict(dense_params["trunk"])
    halved["block_1"] = dict(halved["block_1"])
    halved["block_1"]["mlp"] = dict(halved["block_1"]["mlp"])
    halved["block_1"]["mlp"]["down"] = jax.tree.map(
        lambda leaf: leaf / 2, halved["block_1"]["mlp"]["down"]
    )
    wanted = predict(dense, dense_params | {"trunk": halved}, "first")
    actual = predict(sparse, params, "first")
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


def test_every_expert_is_a_copy_and_routers_stay_fresh():
    sparse = model()
    fresh, _ = variables(sparse)
    dense_params, _ = variables(model(num_experts=0), seed=2)
    params = upcycle(fresh, dense_params)
    moe = params["trunk"]["block_1"]["moe"]
    mlp = dense_params["trunk"]["block_1"]["mlp"]
    for expert in range(4):
        jax.tree.map(
            lambda copy, leaf, expert=expert: np.testing.assert_array_equal(
                copy[expert], leaf
            ),
            moe["experts"],
            mlp,
        )
    np.testing.assert_array_equal(
        moe["router"]["gate"]["kernel"],
        fresh["trunk"]["block_1"]["moe"]["router"]["gate"]["kernel"],
    )
    for task in TASKS:
        np.testing.assert_array_equal(
            params["heads"][task]["logits"]["kernel"],
            dense_params["heads"][task]["logits"]["kernel"],
        )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda dense: dense["trunk"]["block_1"]["mlp"]["up"].update(
                kernel=np.zeros((8, 3), np.float32)
            ),
            r"experts/up/kernel is \(4, 8, 16\), and block_1/mlp/up/kernel of the "
            r"dense trunk \(8, 3\); give experts and perceptrons the same sizes",
        ),
        (
            lambda dense: dense["trunk"].pop("block_0"),
            "the trunk has block_0/.*, and the dense one no block_0/",
        ),
        (
            lambda dense: dense["trunk"].update(registers=np.zeros(3)),
            "the dense trunk has registers, which has no place",
        ),
        (
            lambda dense: dense["heads"]["first"]["logits"].update(bias=np.zeros(7)),
            "the head of task 'first' differs from the dense model's in logits/bias",
        ),
    ],
)
def test_what_differs_is_named(change, expected):
    params, _ = variables(model())
    dense, _ = variables(model(num_experts=0))
    change(dense)
    with pytest.raises(ValueError, match=expected):
        upcycle(params, dense)


def test_a_task_that_the_dense_model_lacks_has_a_fresh_head():
    params, _ = variables(model())
    dense, _ = variables(model(num_experts=0), seed=2)
    del dense["heads"]["third"]
    assert upcycle(params, dense)["heads"]["third"] is params["heads"]["third"]
