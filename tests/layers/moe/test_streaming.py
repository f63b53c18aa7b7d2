import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.mlp import SwiGlu
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import ExpertChoice, NoisyTopK
from mtl_jax.layers.moe.streaming import (
    MISSING,
    PlacedExperts,
    place_experts,
    streaming,
)

EXPERTS, WIDTH = 6, 8
TOKENS = jax.random.normal(jax.random.key(0), (4, 12, WIDTH))
ROUTER = functools.partial(
    NoisyTopK,
    gate=functools.partial(Gate, kernel_init=nn.initializers.normal(1.0)),
)
LAYER = functools.partial(
    MoE,
    num_experts=EXPERTS,
    expert_hidden=16,
    group_size=2,
    num_selected=2,
    capacity_factor=None,
    num_tasks=2,
    router=ROUTER,
)


class Affine(nn.Module):
    """An expert that is a module and nothing else."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], dtype=self.dtype)(jnp.sin(x))


@functools.cache
def parameters(**fields):
    layer = LAYER(**fields)
    init = jax.jit(functools.partial(layer.init, train=False))
    return nn.unbox(init(jax.random.key(1), TOKENS, 0))["params"]


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, task):
    with streaming():
        return layer.apply(
            {"params": params}, TOKENS, task, train=False, mutable=["statistics"]
        )


def run(placed, task=1, **fields):
    params = parameters(**fields)
    if placed is not None:
        params = params | {"experts": place_experts(params["experts"], **placed)}
    return apply(LAYER(**fields), params, task)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"capacity_factor": 2.0, "evaluation_capacity_factor": 0.6},
        {"expert": SwiGlu, "num_shared_experts": 1},
        {"expert": Affine},
    ],
    ids=["dropless", "capacity", "swiglu", "module"],
)
def test_experts_compute_the_same_wherever_they_are(fields):
    plain, statistics = run(None, **fields)
    scale = jnp.max(jnp.abs(plain))
    for resident in ((), (1, 4), range(EXPERTS)):
        output, found = run({"resident": resident}, **fields)
        np.testing.assert_allclose(output, plain, rtol=0, atol=1e-6 * scale)
        for name, value in statistics["statistics"].items():
            np.testing.assert_array_equal(found["statistics"][name], value)
        assert not found["statistics"][MISSING].any()


def test_experts_compute_in_the_layers_type_from_float32():
    plain, _ = run(None, dtype=jnp.bfloat16)
    output, _ = run({"resident": (2,)}, dtype=jnp.bfloat16)
    assert output.dtype == jnp.bfloat16
    # Both round each expert's output to bfloat16, which has 8 bits.
    np.testing.assert_allclose(
        output.astype(jnp.float32), plain.astype(jnp.float32), atol=2**-7
    )


def test_what_wants_an_expert_that_is_nowhere_is_counted_and_adds_nothing():
    resident = (0, 3)
    output, found = run({"resident": resident, "others": "nowhere"})
    params = parameters()
    logits = jnp.einsum("btd,de->bte", TOKENS, params["router"]["gate"]["kernel"][1])
    chosen = np.argsort(-np.asarray(logits), axis=-1)[..., :2]
    wanted = np.bincount(chosen.reshape(-1), minlength=EXPERTS)
    expected = [0 if e in resident else wanted[e] for e in range(EXPERTS)]
    np.testing.assert_array_equal(found["statistics"][MISSING], expected)
    gates = np.asarray(jax.nn.softmax(logits))
    experts = params["experts"]
    sum_of_those_here = np.zeros(TOKENS.shape)
    for expert in resident:
        up, down = (
            jax.tree.map(
                lambda p, e=expert: np.asarray(p[e], np.float64), experts[name]
            )
            for name in ("up", "down")
        )
        hidden = np.asarray(TOKENS, np.float64) @ up["kernel"] + up["bias"]
        hidden = (
            0.5
            * hidden
            * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        )
        value = hidden @ down["kernel"] + down["bias"]
        weight = np.where((chosen == expert).any(-1), gates[..., expert], 0)
        sum_of_those_here += weight[..., None] * value
    np.testing.assert_allclose(output, sum_of_those_here, atol=1e-5)


def test_experts_are_in_the_memory_that_they_were_placed_in():
    experts = parameters()["experts"]
    placed = place_experts(experts, (4, 1, 4))
    assert placed.place.tolist() == [2, 0, 3, 4, 1, 5]
    for where, indices, memory in (
        (placed.resident, [1, 4], "device"),
        (placed.waiting, [0, 2, 3, 5], "pinned_host"),
    ):
        jax.tree.map(
            lambda there, all_, indices=indices: np.testing.assert_array_equal(
                there, all_[np.array(indices)]
            ),
            where,
            experts,
        )
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(where)}
        assert kinds == {memory}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_nothing_larger_than_one_expert_leaves_the_host(platform):
    params = parameters()
    params = params | {"experts": place_experts(params["experts"], ())}
    traced = apply.trace(LAYER(), params, 1)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    copied = re.findall(r"@annotate_device_placement\(.*-> tensor<(\S+)>", program)
    # The first expert's four parameters before the loop, the next one's within.
    assert sorted(copied) == sorted(2 * ["16x8xf32", "16xf32", "8x16xf32", "8xf32"])
    on_host = re.findall(r"tensor<(\S+)> \{mhlo.memory_kind = \"pinned_host\"", program)
    assert sorted(on_host) == ["6x16x8xf32", "6x16xf32", "6x8x16xf32", "6x8xf32"]


def test_routers_that_fill_buffers_need_all_experts():
    fields = {"router": ExpertChoice, "num_tasks": None}
    layer = LAYER(**fields)
    params = nn.unbox(layer.init(jax.random.key(1), TOKENS, train=False))["params"]
    plain, _ = apply(layer, params, None)
    experts = params.pop("experts")
    placed = params | {"experts": place_experts(experts, range(EXPERTS))}
    output, _ = apply(layer, placed, None)
    np.testing.assert_array_equal(output, plain)
    placed = params | {"experts": place_experts(experts, range(1, EXPERTS))}
    with pytest.raises(ValueError, match="fills the buffers of all experts"):
        apply(layer, placed, None)


def test_without_placed_experts_nothing_changes():
    plain = LAYER().apply({"params": parameters()}, TOKENS, 1, train=False)
    output, found = run(None)
    np.testing.assert_allclose(output, plain, atol=1e-6)
    assert MISSING not in found["statistics"]


def test_mistakes_are_explained():
    experts = parameters()["experts"]
    with pytest.raises(ValueError, match=r"names expert 6, but the layer has 6"):
        place_experts(experts, (2, 6))
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="splits examples or experts over"),
        streaming(),
    ):
        pass
    assert isinstance(place_experts(experts, ()), PlacedExperts)
