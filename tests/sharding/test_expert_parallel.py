import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mtl_jax.sharding import expert_parallel, make_mesh

MESHES = [
    {},
    {"expert": 8},
    {"expert": 4},
    {"fsdp": 2, "expert": 2},
    {"data": 2, "expert": 2, "model": 2},
]


def buffers():
    return jnp.arange(8 * 8 * 3 * 2, dtype=jnp.float32).reshape(8, 8, 3, 2)


@pytest.mark.parametrize("sizes", MESHES)
def test_exchange_moves_shards_and_changes_nothing(sizes):
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        sent = jax.jit(expert_parallel.exchange)(buffers())
        back = jax.jit(expert_parallel.exchange_back)(sent)
    np.testing.assert_array_equal(sent, buffers())
    np.testing.assert_array_equal(back, buffers())
    if mesh.shape["expert"] > 1:
        shard = sent.addressable_shards[0].data.shape
        assert shard[0] == 8 // mesh.shape["expert"]
        assert shard[1] == 8 // (mesh.shape["data"] * mesh.shape["fsdp"])


def test_exchange_is_one_all_to_all_each_way():
    mesh = make_mesh(expert=4)
    by_group = NamedSharding(mesh, PartitionSpec(None, ("data", "expert")))
    with jax.set_mesh(mesh):
        x = jax.device_put(buffers(), by_group)
        compiled = jax.jit(expert_parallel.exchange).lower(x).compile()
    collectives = re.findall(
        r"\b(all-to-all|all-gather|all-reduce|collective-permute)\(",
        compiled.as_text(),
    )
    assert collectives == ["all-to-all"]


def test_groups_are_mapped_where_they_are():
    seen = []

    def double(x, weight):
        seen.append((x.shape, weight.shape))
        return 2 * x * weight[None], weight

    x = jnp.arange(24.0).reshape(3, 8)
    weight = jnp.arange(8.0)
    mapped = expert_parallel.map_groups(double, in_axes=(1, 0), out_axes=(1, 0))
    expected, _ = mapped(x, weight)
    with jax.set_mesh(make_mesh(expert=4)):
        mapped = expert_parallel.map_groups(double, in_axes=(1, 0), out_axes=(1, 0))
        actual, same = jax.jit(mapped)(x, weight)
    assert seen == [((3, 8), (8,)), ((3, 1), (1,))]
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(same, weight)


def test_nothing_is_mapped_within_a_mapped_function():
    with jax.set_mesh(make_mesh(data=8)):

        def local(x):
            return expert_parallel.map_groups(
                lambda x: x + 1, in_axes=(0,), out_axes=0
            )(x)

        mapped = jax.shard_map(
            local, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
        )
        np.testing.assert_array_equal(jax.jit(mapped)(jnp.zeros(8)), np.ones(8))


def test_the_platform_is_that_of_the_device_to_be_used(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert expert_parallel.platform() == "gpu"
    for device in ("cpu", jax.devices("cpu")[1]):
        with jax.default_device(device):
            assert expert_parallel.platform() == "cpu"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_add_up_with_an_axis_left_to_the_compiler(dtype):
    """Whole numbers below 256, which both dtypes have: expert e gives e · x."""

    def experts(factors, x):
        return jnp.sum(factors) * x

    def loss(factors, x):
        y = expert_parallel.map_experts(experts)(factors, x)
        return jnp.sum(y, dtype=jnp.float32), y

    factors = jnp.arange(1, 5).astype(dtype)
    x = jnp.arange(16).reshape(8, 2).astype(dtype)
    with jax.set_mesh(make_mesh(data=2, expert=2, model=2)):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, y), gradients = run(factors, x)
    assert {leaf.dtype for leaf in (y, *gradients)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(np.float32(y), 10 * np.arange(16).reshape(8, 2))
    np.testing.assert_array_equal(np.float32(gradients[0]), [120] * 4)
    np.testing.assert_array_equal(np.float32(gradients[1]), np.full((8, 2), 10))


@pytest.mark.parametrize(
    ("num_groups", "num_experts", "message"),
    [
        (4, 8, "4 routing groups.*multiple of 8"),
        (8, 6, "num_experts=6 does not divide over mesh axis 'expert' of size 4"),
    ],
)
def test_sizes_that_do_not_divide(num_groups, num_experts, message):
    expert_parallel.check_divisible(num_groups=num_groups, num_experts=num_experts)
    with jax.set_mesh(make_mesh(expert=4)), pytest.raises(ValueError, match=message):
        expert_parallel.check_divisible(num_groups=num_groups, num_experts=num_experts)
