import functools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import ConditionGate
from mtl_jax.layers.moe.routers import NoisyTopK

COLLECTIONS = ["losses", "statistics"]


def layer(**changes):
    fields = {
        "num_experts": 6,
        "expert_hidden": 5,
        "group_size": 2,
        "capacity_factor": 3.0,
    }
    return MoE(**{**fields, **changes})


def inputs(batch=4, tokens=7, width=8):
    return jax.random.normal(jax.random.key(0), (batch, tokens, width))


def variables(module, x, task=None):
    """Random variables, biases included: initial ones take long to compile."""
    init = functools.partial(module.init, train=False)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), x, task))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.float32(0.4 * rng.normal(size=leaf.shape)), shapes
    )


def apply(module, params, x, task=None, *, train=False, seed=None):
    """Output and collections, compiled."""
    rngs = None if seed is None else {"router": jax.random.key(seed)}

    @jax.jit
    def compiled(params, x, task):
        return module.apply(
            params, x, task, train=train, rngs=rngs, mutable=COLLECTIONS
        )

    return compiled(params, x, task)


def dense_oracle(params, x, num_selected, noise=0.0):
    """Every expert on every token, weighted by the gates that were selected."""
    logits = x @ params["router"]["gate"]["kernel"]
    noisy = logits + noise
    least = jnp.sort(noisy, axis=-1)[..., -num_selected, None]
    gates = jnp.where(noisy >= least, jax.nn.softmax(noisy), 0.0)
    up, down = params["experts"]["up"], params["experts"]["down"]
    hidden = jnp.einsum("bnd,edh->benh", x, up["kernel"]) + up["bias"][None, :, None]
    outputs = jnp.einsum("benh,ehd->bend", jax.nn.gelu(hidden), down["kernel"])
    outputs = outputs + down["bias"][None, :, None]
    return jnp.einsum("bne,bend->bnd", gates, outputs)


@pytest.mark.parametrize("num_selected", [1, 2, 6])
def test_values_and_gradients_against_the_dense_oracle(num_selected):
    # With capacity for all tokens of a group, nothing is dropped.
    module = layer(num_selected=num_selected, capacity_factor=6.0)
    x = inputs()
    params = variables(module, x)["params"]

    def sparse(params, x):
        return module.apply({"params": params}, x, train=False)

    def dense(params, x):
        return dense_oracle(params, x, num_selected)

    cotangent = jax.random.normal(jax.random.key(3), x.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, params, x):
        value, pullback = jax.vjp(function, params, x)
        return value, pullback(cotangent)

    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=1e-5, atol=1e-5
        ),
        value_and_gradients(sparse, params, x),
        value_and_gradients(dense, params, x),
    )


def test_noise_is_drawn_in_training_alone():
    module = layer(router=partial(NoisyTopK, noise_std=20.0), capacity_factor=6.0)
    x = inputs()
    params = variables(module, x)

    @jax.jit
    def trained(key):
        return module.apply(params, x, train=True, rngs={"router": key})

    first, again, other = (trained(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    quiet = layer(router=partial(NoisyTopK, noise_std=0.0), capacity_factor=6.0)
    np.testing.assert_array_equal(
        apply(quiet, params, x, train=True)[0], apply(module, params, x)[0]
    )


def test_each_task_has_its_router_over_shared_experts():
    gates = layer(num_tasks=3)
    x = inputs()
    params = variables(gates, x, 0)["params"]
    kernel = params["router"]["gate"]["kernel"]
    assert kernel.shape == (3, 8, 6)
    output = jax.jit(lambda task: gates.apply({"params": params}, x, task, train=False))
    for task in range(3):
        alone = {"params": {**params, "router": {"gate": {"kernel": kernel[task]}}}}
        expected, _ = apply(layer(), alone, x)
        np.testing.assert_allclose(output(jnp.int32(task)), expected, atol=1e-6)

    def loss(params):
        y, state = gates.apply(
            {"params": params}, x, 1, train=False, mutable=COLLECTIONS
        )
        return jnp.sum(y**2) + state["losses"]["auxiliary"]

    gradient = np.asarray(jax.jit(jax.grad(loss))(params)["router"]["gate"]["kernel"])
    assert np.abs(gradient[1]).max() > 1e-3
    np.testing.assert_array_equal(gradient[[0, 2]], np.zeros((2, 8, 6)))


def test_statistics_of_a_uniform_router_by_hand():
    # Equal logits: every token chooses experts 0 and 1 of 4, each of which has
    # ceil(1 · 2 · 8 / 4) = 4 slots for 8 tokens.
    module = layer(num_experts=4, capacity_factor=1.0, num_tasks=2)
    x = inputs(batch=6, tokens=4)
    params = variables(module, x, 0)
    gate = params["params"]["router"]["gate"]
    gate["kernel"] = jnp.zeros_like(gate["kernel"])
    y, state = apply(module, params, x, jnp.int32(0))
    statistics = state["statistics"]
    np.testing.assert_allclose(statistics["load"], [0.5, 0.5, 0, 0])
    assert statistics["dropped"] == 0.5
    assert statistics["dead"] == 0.5
    np.testing.assert_allclose(statistics["entropy"], math.log(4), rtol=1e-6)
    np.testing.assert_allclose(statistics["importance_loss"], 0.0, atol=1e-12)
    assert state["losses"]["auxiliary"].shape == ()
    np.testing.assert_allclose(state["losses"]["auxiliary"], 0.0, atol=1e-12)
    # The second example of each group finds both experts full.
    np.testing.assert_array_equal(y[1::2], jnp.zeros_like(y[1::2]))
    assert np.all(np.any(np.asarray(y[::2]) != 0, axis=-1))


def test_auxiliary_loss_is_weighted_and_differentiable():
    module = layer(router=partial(NoisyTopK, importance_weight=2.0, load_weight=3.0))
    x = inputs()
    params = variables(module, x)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_gradient(params):
        _, state = apply(module, params, x, train=True, seed=0)
        return state["losses"]["auxiliary"], state["statistics"]

    (loss, statistics), gradient = loss_and_gradient(params)
    expected = 2 * statistics["importance_loss"] + 3 * statistics["load_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert np.abs(gradient["params"]["router"]["gate"]["kernel"]).max() > 1e-3
    assert not np.any(gradient["params"]["experts"]["up"]["kernel"])


def test_evaluation_may_have_a_capacity_of_its_own():
    quiet = partial(NoisyTopK, noise_std=0.0)
    module = layer(router=quiet, capacity_factor=0.5, evaluation_capacity_factor=None)
    x = inputs()
    params = variables(module, x)
    for train, capacity_factor in ((True, 0.5), (False, None)):
        other = layer(router=quiet, capacity_factor=capacity_factor)
        output, written = apply(module, params, x, train=train)
        expected, state = apply(other, params, x, train=train)
        np.testing.assert_array_equal(output, expected)
        dropped = written["statistics"]["dropped"]
        assert dropped == state["statistics"]["dropped"]
        assert (dropped > 0) == train


def test_groups_do_not_see_each_other():
    module = layer(capacity_factor=0.5)
    x = inputs()
    params = variables(module, x)
    changed = x.at[:2].set(jax.random.normal(jax.random.key(9), x[:2].shape))
    before, _ = apply(module, params, x)
    after, _ = apply(module, params, changed)
    np.testing.assert_allclose(before[2:], after[2:], atol=1e-6)
    assert not np.allclose(before[:2], after[:2])


def test_parameters_have_an_expert_axis_and_their_own_values():
    module = layer(num_tasks=3)
    init = jax.jit(functools.partial(module.init, train=False))
    boxed = init(jax.random.key(0), inputs(), 0)
    assert set(boxed) == {"params"}
    up, down = boxed["params"]["experts"]["up"], boxed["params"]["experts"]["down"]
    assert up["kernel"].names == ("expert", "embed", "mlp")
    assert down["bias"].names == ("expert", "embed")
    assert boxed["params"]["router"]["gate"]["kernel"].names == (
        "task",
        "embed",
        "expert_logits",
    )
    assert up["kernel"].value.shape == (6, 8, 5)
    assert not np.allclose(up["kernel"].value[0], up["kernel"].value[1])


class Scale(nn.Module):
    """An expert that multiplies by one learnt number."""

    hidden: int
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.normal(), ())
        return x * self.param("scale", init, ())


def test_any_module_is_an_expert():
    module = layer(expert=Scale, num_selected=1, capacity_factor=6.0)
    x = inputs()
    params = variables(module, x)["params"]
    gates = jax.nn.softmax(x @ params["router"]["gate"]["kernel"])
    scale = params["experts"]["scale"][jnp.argmax(gates, -1)]
    expected = x * (scale * jnp.max(gates, -1))[..., None]
    actual, _ = apply(module, {"params": params}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_routing_is_in_float32_whatever_the_dtype():
    x = inputs()
    params = variables(layer(), x)
    exact, state = apply(layer(), params, x)
    module = layer(dtype=jnp.bfloat16)
    rounded, rounded_state = apply(module, params, x)
    assert exact.dtype == jnp.float32
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.03)
    jax.tree.map(np.testing.assert_array_equal, rounded_state, state)


@pytest.mark.parametrize(
    ("changes", "batch", "task", "message"),
    [
        ({"group_size": 3}, 4, None, "group_size=3 does not divide the batch of 4"),
        ({"group_size": 8}, 4, None, "group_size=8 does not divide the batch of 4"),
        ({"group_size": 0}, 4, None, "group_size=0"),
        ({"group_size": 2.0}, 4, None, r"group_size=2\.0 is not an integer; give"),
        ({"num_selected": 2.0}, 4, None, r"num_selected=2\.0 is not an integer; give"),
        ({"num_experts": 6.0}, 4, None, r"num_experts=6\.0 is not an integer; give"),
        ({"expert_hidden": 8.0}, 4, None, r"expert_hidden=8\.0 is not an integer"),
        ({"num_shared_experts": True}, 4, None, "num_shared_experts=True is not an i"),
        ({}, 0, None, r"x has shape \(0, 7, 8\), which leaves nothing to route; give"),
        ({"num_experts": 0}, 4, None, "num_experts=0 leaves .* make it 1 or more"),
        (
            {"num_selected": 7},
            4,
            None,
            "num_selected=7 .* num_experts=6, .* change num_selected, or have more",
        ),
        ({"num_selected": 0}, 4, None, "num_selected=0"),
        ({"capacity_factor": 0.0}, 4, None, r"capacity_factor=0\.0"),
        ({"capacity_factor": math.inf}, 4, None, "capacity_factor=inf .* or None for"),
        ({"capacity_factor": math.nan}, 4, None, "capacity_factor=nan is not a finite"),
        (
            {"evaluation_capacity_factor": -1.0},
            4,
            None,
            r"evaluation_capacity_factor=-1\.0 gives experts no slot; .* or None for",
        ),
        (
            {"evaluation_capacity_factor": "as in training"},
            4,
            None,
            "evaluation_capacity_factor=as in training is not a finite number; make",
        ),
        ({"num_shared_experts": -1}, 4, None, "num_shared_experts=-1 .* make it 0"),
        ({"num_tasks": 2}, 4, None, "task=None does not fit num_tasks=2"),
        ({}, 4, 0, "task=0 does not fit num_tasks=None"),
        ({"num_tasks": 2}, 4, 2, "task=2 is not one of num_tasks=2"),
    ],
)
def test_bad_input_is_named(changes, batch, task, message):
    with pytest.raises(ValueError, match=message):
        layer(**changes).init(jax.random.key(0), inputs(batch), task, train=False)


def test_input_of_another_shape_is_named():
    x, message = inputs(), r"x has shape \(4, 7\), .* \[batch, tokens, width\]; give"
    with pytest.raises(ValueError, match=message):
        layer().init(jax.random.key(0), x[..., 0], train=False)
    message = r"x has shape \(4, 0, 8\), which leaves nothing to route; give"
    for module in (layer(), layer(capacity_factor=None)):
        with pytest.raises(ValueError, match=message):
            module.init(jax.random.key(0), x[:, :0], train=False)
    module = layer(router=partial(NoisyTopK, gate=ConditionGate))
    for shape in [(2, 5), (8, 5), (4,), (4, 7, 5)]:
        message = rf"condition has shape {re.escape(str(shape))}, .* \[4, features\]"
        with pytest.raises(ValueError, match=message):
            module.init(jax.random.key(0), x, None, jnp.zeros(shape), train=False)


def test_experts_start_with_equal_load():
    module = layer(num_experts=8, group_size=32)
    x = inputs(batch=32, tokens=64)
    params = module.init(jax.random.key(0), x, train=False)
    _, collections = module.apply(
        params, x, train=True, rngs={"router": jax.random.key(1)}, mutable=COLLECTIONS
    )
    # 4,096 assignments: a share of 1/8 has a standard deviation of 0.005.
    np.testing.assert_allclose(collections["statistics"]["load"], 1 / 8, atol=0.02)
