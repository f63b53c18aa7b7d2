"""More tasks and experts, and what was there as it was."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_experts import (
    IMAGES,
    QUICK,
    heads_of_experts,
    model,
    predict,
    variables,
)

from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.execution import Execution, choose
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.grouped import block_sizes
from mtl_jax.layers.moe.routers import M3ViT, ModSquad, NoisyTopK, Switch
from mtl_jax.models.experts import expert_usage, extend, only_new
from mtl_jax.models.multitask import repeat
from mtl_jax.sharding.rules import path_name

OLD = ("first", "second")
NEW = (*OLD, "third")
MANY = jax.random.uniform(jax.random.key(5), (12, 8, 8, 3), minval=-1)


def carried_out(model, execution):
    moe = functools.partial(model.trunk.moe, execution=execution)
    return dataclasses.replace(model, trunk=model.trunk.clone(moe=moe))


def router(*visible):
    gate = functools.partial(
        Gate,
        kernel_init=nn.initializers.normal(0.5),
        visible_experts=visible or None,
    )
    return functools.partial(NoisyTopK, noise_std=0.0, gate=gate)


@functools.cache
def models():
    """A model of two tasks and three experts, and one of a task and two more."""
    small = model(OLD, num_experts=3, router=router(), task_embedding=True)
    large = model(NEW, num_experts=5, router=router(3, 3, 5), task_embedding=True)
    old, _ = variables(small)
    fresh, _ = variables(large, seed=2)
    return small, old, large, extend(fresh, old)


@pytest.mark.parametrize(("execution", "tasks"), [(QUICK, OLD), (None, OLD[1:])])
def test_old_tasks_compute_the_same_to_the_last_bit(execution, tasks):
    small, old, large, grown = models()
    for task in tasks:
        np.testing.assert_array_equal(
            predict(carried_out(large, execution), grown, task, images=MANY),
            predict(carried_out(small, execution), old, task, images=MANY),
        )


def assert_layer_grows_alike(router, width, old, new, num_selected, shape):
    """Compares a layer of two tasks with one that has more experts for a third."""

    def layer(num_experts, *visible_experts):
        return MoE(
            num_experts,
            2 * width,
            group_size=1,
            num_selected=num_selected,
            capacity_factor=None,
            num_tasks=len(visible_experts) or 2,
            router=functools.partial(
                router,
                gate=functools.partial(Gate, visible_experts=visible_experts or None),
            ),
        )

    x = jnp.float32(np.random.default_rng(0).normal(size=(*shape, width)))
    outputs, params = [], {}
    for seed, module in enumerate((layer(old), layer(new, old, old, new))):
        params = extend(_scaled(module, x, seed), params)
        apply = jax.jit(functools.partial(module.apply, train=False))
        outputs.append(apply({"params": params}, x, jnp.int32(1)))
    assert np.abs(outputs[0]).mean() > 1e-3
    np.testing.assert_array_equal(outputs[1], outputs[0])


def _scaled(module, x, seed):
    """Random parameters of about the size that initial ones have."""
    init = functools.partial(module.init, train=False)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), x, 0)["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.float32(
            rng.normal(size=leaf.shape) / leaf.shape[max(leaf.ndim - 2, 0)] ** 0.5
        ),
        shapes,
    )


def test_a_layer_of_usual_size_computes_the_same_to_the_last_bit():
    """At these sizes, sums and products of XLA for CPUs round by number of experts."""
    assert_layer_grows_alike(ModSquad, 96, 8, 12, 2, (8, 49))


@pytest.mark.slow
@pytest.mark.parametrize("router", [ModSquad, NoisyTopK, M3ViT, Switch])
@pytest.mark.parametrize(
    ("width", "old", "new", "num_selected", "shape"),
    [
        (96, 8, 12, 2, (64, 49)),
        (96, 8, 12, 2, (8, 49)),
        (96, 8, 12, 2, (3, 49)),
        (192, 8, 12, 2, (8, 64)),
        (384, 16, 24, 4, (1, 64)),
        (768, 16, 24, 4, (1, 20)),
    ],
)
def test_layers_of_any_size_compute_the_same_to_the_last_bit(
    router, width, old, new, num_selected, shape
):
    selected = 1 if router is Switch else num_selected
    assert_layer_grows_alike(router, width, old, new, selected, shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    ["ModSquad 3", "ModSquad 64", "NoisyTopK 8", "ModSquad 8 scan", "Switch 8"],
)
def test_a_trunk_of_usual_size_computes_the_same_to_the_last_bit(arguments):
    """In a process that compiles as users do, where XLA fuses otherwise than here."""
    script = Path(__file__).with_name("growing_trunk.py")
    subprocess.run(
        [sys.executable, script, *arguments.split()],
        env={**os.environ, "XLA_FLAGS": ""},
        check=True,
    )


def test_what_a_layer_chooses_by_itself_differs_with_the_number_of_experts():
    """Else the test before would say little of ``execution=None``."""
    how = functools.partial(
        choose,
        num_assignments=96,
        num_selected=2,
        capacity_factor=None,
        uses_matmuls=True,
        parameters={},
    )
    chosen = {how(num_experts=number) for number in (3, 5)}
    assert chosen == {Execution("all_gather", "sorted", "blocks")}
    assert block_sizes(96, 3, 48) == (16, 24, 32, 40, 48)
    assert block_sizes(96, 5, 48) == (16, 24, 32)


def test_the_new_task_may_go_to_any_expert():
    _, _, large, grown = models()
    used = expert_usage(large, grown, "third", [IMAGES])["block_1"]
    assert used[3:].sum() > 0


def test_an_expert_that_is_hidden_is_chosen_by_nobody_and_has_no_gate():
    x = jax.random.normal(jax.random.key(0), (1, 6, 4))
    module = router(2, 4)(num_experts=4, num_selected=2, num_tasks=2)
    init = functools.partial(module.init, train=False)
    params = nn.unbox(init(jax.random.key(1), x, 0))
    for task, visible in enumerate((2, 4)):
        routing = module.apply(params, x, jnp.int32(task), train=False)
        assert int(routing.expert_index.max()) == visible - 1
        np.testing.assert_array_equal(routing.probabilities[..., visible:], 0)
        np.testing.assert_allclose(routing.probabilities.sum(-1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="not one number for each of num_tasks=2"):
        router(2)(num_experts=4, num_selected=2, num_tasks=2).init(
            jax.random.key(1), x, 0, train=False
        )


def test_training_moves_what_is_new_alone():
    _, old, large, grown = models()
    shapes = {
        path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(old)
    }
    optimizer = only_new(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(0.1),
            optax.sgd(0.05),
        ),
        shapes,
    )

    def loss(params):
        output = large.apply_trunk(repeat(params["trunk"], 3), IMAGES, NEW, train=True)
        predictions = (
            large.apply_head(params["heads"][task], output.features[i], task)
            for i, task in enumerate(NEW)
        )
        return sum(jnp.mean((prediction - 1) ** 2) for prediction in predictions)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = grown, optimizer.init(grown)
    for _ in range(2):
        params, state = step(params, state)
    moved = jax.tree.map(lambda a, b: np.asarray(a != b), params, grown)
    moe, heads = moved["trunk"]["block_1"]["moe"], moved["heads"]
    kernel = moe["router"]["gate"]["kernel"]
    assert kernel[2].all()
    # Of experts that they do not see, old gates may change their logits.
    assert not kernel[:2, :, :3].any()
    assert moe["experts"]["up"]["kernel"][3:].any()
    assert not moe["experts"]["up"]["kernel"][:3].any()
    assert moved["trunk"]["task_embedding"][2].all()
    assert not moved["trunk"]["task_embedding"][:2].any()
    assert heads["third"]["logits"]["kernel"].all()
    others = {name: moved["trunk"][name] for name in ("block_0", "norm", "embedding")}
    assert not any(leaf.any() for leaf in jax.tree.leaves(others))
    assert not any(leaf.any() for task in OLD for leaf in jax.tree.leaves(heads[task]))
    # The same program on the same experts: to the last bit.
    for task in OLD:
        np.testing.assert_array_equal(
            predict(large, params, task), predict(large, grown, task)
        )


@pytest.mark.parametrize(
    ("larger", "expected"),
    [
        (
            model(OLD[:1], num_experts=3, router=router()),
            r"heads/second/logits/bias is \(3,\) in the model to extend, and absent",
        ),
        (
            model(OLD, num_experts=2, router=router()),
            r"block_1/moe/experts/.* is \(3, .*\) in the model to extend, and \(2, ",
        ),
        (
            model(OLD, num_experts=3, attention=heads_of_experts()),
            r"block_0/attention/key/bias is \(2, 4\) .* and \(4,\) in this one",
        ),
    ],
)
def test_what_does_not_fit_is_named(larger, expected):
    old, _ = variables(model(OLD, num_experts=3, router=router()))
    fresh, _ = variables(larger)
    with pytest.raises(ValueError, match=expected):
        extend(fresh, old)


def test_other_sizes_do_not_grow():
    old, _ = variables(model(OLD, num_experts=3, router=router()))
    fresh = jax.tree.map(jnp.asarray, old)
    norm = fresh["trunk"]["norm"]
    norm["scale"] = jnp.ones(9)
    with pytest.raises(ValueError, match=r"trunk/norm/scale is \(8,\) .* and \(9,\)"):
        extend(fresh, old)
