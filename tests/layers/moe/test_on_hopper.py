"""Kernels for Hopper GPUs: lowered everywhere, run where there is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mtl_jax.flops import count_flops
from mtl_jax.layers.moe import MoE, grouped_matmul
from mtl_jax.layers.moe.execution import Execution, choose
from mtl_jax.sharding import expert_parallel, make_mesh

DROPLESS = {"capacity_factor": None, "num_selected": 2, "uses_matmuls": True}


@pytest.fixture
def hopper(monkeypatch):
    device = SimpleNamespace(core_count=132, compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(expert_parallel, "platform", lambda: "gpu")


def experts(dtype=jnp.bfloat16, width=128, hidden=384):
    return {
        "in": jnp.zeros((4, width, hidden), dtype),
        "bias": jnp.zeros((4, hidden), dtype),
    }


def chosen(parameters):
    return choose(num_assignments=96, num_experts=4, parameters=parameters, **DROPLESS)


def test_is_chosen_where_it_can_be(hopper):
    kernels = Execution("all_gather", "sorted", "hopper")
    blocks = Execution("all_gather", "sorted")
    assert chosen(experts()) == kernels
    assert chosen(experts(jnp.float16)) == kernels
    assert chosen(experts(jnp.float32)) == blocks
    assert chosen(experts(hidden=96)) == blocks


def test_is_not_chosen_on_other_gpus(hopper, monkeypatch):
    device = SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert chosen(experts()) == Execution("all_gather", "sorted")


@pytest.mark.parametrize(("devices", "matmul"), [(4, "hopper"), (8, "blocks")])
def test_is_not_chosen_where_most_rows_could_only_be(hopper, devices, matmul):
    mesh = make_mesh(expert=devices, data=-1, devices=jax.local_devices())
    with jax.set_mesh(mesh):
        assert chosen(experts()).matmul == matmul


def test_asked_for_where_it_cannot_be():
    layer = MoE(4, 128, 1, execution=Execution("all_gather", "sorted", "hopper"))
    with pytest.raises(ValueError, match="'hopper', which takes a Hopper GPU"):
        jax.eval_shape(
            lambda: layer.init(jax.random.key(0), jnp.ones((1, 6, 128)), train=False)
        )


def test_product_and_gradients_are_kernels_that_count_every_row_once(hopper):
    rows, kernel = jnp.ones((300, 128), jnp.bfloat16), experts()["in"]
    count = jnp.asarray([100, 0, 150, 50], jnp.int32)

    def loss(rows, kernel):
        return jnp.sum(grouped_matmul.hopper(rows, kernel, count), dtype=jnp.float32)

    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(rows, kernel)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @mosaic_gpu") == 3
    assert "ragged_dot(" not in program
    # 300 rows take three blocks of 128.
    assert count_flops(traced.jaxpr) == 3 * 2 * 384 * 128 * 384


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "expert": 4}], ids=str)
def test_layers_on_meshes_are_lowered_with_kernels(hopper, mesh):
    mesh = make_mesh(**mesh, devices=jax.local_devices())
    layer = MoE(4, 384, 1, capacity_factor=None, dtype=jnp.bfloat16)
    x = jnp.ones((8, 6, 128), jnp.bfloat16)

    def loss(variables):
        y = layer.apply(variables, x, train=False)
        return jnp.sum(jnp.asarray(y), dtype=jnp.float32)

    with jax.set_mesh(mesh):
        variables = nn.unbox(
            jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
        )
        traced = jax.jit(jax.grad(loss)).trace(variables)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Two products forward; backward, two for the kernels and one for the rows between.
    assert program.count("custom_call @mosaic_gpu") == 5


def compute_capability():
    """Of the first NVIDIA GPU; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=True)
    return found.stdout.split()[0]


@pytest.mark.slow
@pytest.mark.skipif(compute_capability() != "9.0", reason="needs a Hopper GPU")
def test_on_the_gpu():
    script = Path(__file__).with_name("on_hopper.py")
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    subprocess.run([sys.executable, script], env=environment, check=True)
