import contextlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import pallas

from mtl_jax.flops import count_flops, counted, stated
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.sharding.mesh import make_mesh


def test_a_scan_counts_as_often_as_it_runs():
    def chain(matrices):
        return jax.lax.scan(lambda x, m: (x @ m, None), jnp.ones((4, 8)), matrices)[0]

    # Five products of [4, 8] and [8, 8], two operations a multiplication and addition.
    assert count_flops(jax.make_jaxpr(chain)(jnp.ones((5, 8, 8)))) == 5 * 2 * 4 * 8 * 8


def test_a_batched_product_and_its_gradient():
    def product(a, b):
        return jnp.sum(jnp.einsum("bij,bjk->bik", a, b))

    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    forward = 2 * 3 * 4 * 5 * 6
    assert count_flops(jax.make_jaxpr(product)(a, b)) == forward
    gradient = jax.make_jaxpr(jax.value_and_grad(product, argnums=(0, 1)))(a, b)
    # The product itself and the two of its backward pass.
    assert count_flops(gradient) == 3 * forward


def test_a_convolution():
    def convolve(x, kernel):
        return jax.lax.conv(x, kernel, (1, 1), "SAME")

    jaxpr = jax.make_jaxpr(convolve)(jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3)))
    assert count_flops(jaxpr) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


def test_a_grouped_product_and_its_gradients_take_every_row_once():
    def product(rows, kernels):
        return jnp.sum(jax.lax.ragged_dot(rows, kernels, jnp.array([4, 0, 6], "int32")))

    rows, kernels = jnp.ones((10, 7)), jnp.ones((3, 7, 5))
    once = 2 * 10 * 7 * 5
    assert count_flops(jax.make_jaxpr(product)(rows, kernels)) == once
    both = jax.value_and_grad(product, argnums=(0, 1))
    gradient = jax.make_jaxpr(both)(rows, kernels)
    assert count_flops(gradient) == 3 * once


def test_what_is_stated_counts_in_place_of_what_is_inside():
    product = stated(lambda a, b: a @ b, 7)

    def often(a, b):
        return jax.lax.scan(lambda c, _: (product(c, b), None), a, length=5)[0]

    jaxpr = jax.make_jaxpr(counted(often, Fraction(2)))(jnp.eye(3), jnp.eye(3))
    assert count_flops(jaxpr) == 2 * 5 * 7


@pytest.mark.parametrize("estimate", [None, 1000])
def test_a_kernel_counts_what_it_says_or_its_grid(estimate):
    def body(a, b, out):
        out[...] = a[...] @ b[...]

    # Six products of [8, 16] and [16, 32] tiles.
    kernel = pallas.pallas_call(
        body,
        grid=(2, 3),
        in_specs=[
            pallas.BlockSpec((8, 16), lambda i, j: (i, 0)),
            pallas.BlockSpec((16, 32), lambda i, j: (0, j)),
        ],
        out_specs=pallas.BlockSpec((8, 32), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((16, 96), jnp.float32),
        cost_estimate=estimate
        and pallas.CostEstimate(flops=estimate, transcendentals=0, bytes_accessed=0),
    )
    jaxpr = jax.make_jaxpr(kernel)(jnp.ones((16, 16)), jnp.ones((16, 96)))
    assert count_flops(jaxpr) == (estimate or 6 * 2 * 8 * 16 * 32)


def test_what_nobody_uses_is_left_out():
    def product(a, b):
        _ = a @ b
        return a @ a

    jaxpr = jax.make_jaxpr(product)(jnp.ones((4, 4)), jnp.ones((4, 9)))
    assert count_flops(jaxpr) == 2 * 4 * 4 * 4


def test_a_loop_counts_as_often_as_it_is_said_to_run():
    def power(matrix, times):
        loop = counted(
            lambda x: jax.lax.fori_loop(0, times, lambda i, x: x @ matrix, x),
            Fraction(5, 2),
        )
        return loop(matrix)

    assert count_flops(jax.make_jaxpr(power)(jnp.ones((4, 4)), 3)) == 2.5 * 2 * 4**3


@pytest.mark.parametrize("matmul", ["blocks", "ragged_dot", "megablox"])
@pytest.mark.parametrize("exchange", [None, "all_gather", "ragged_all_to_all"])
def test_experts_count_for_the_rows_that_they_are_sent(exchange, matmul):
    tokens, width, hidden, selected, num_experts = 64, 6, 10, 2, 8
    layer = MoE(
        num_experts=num_experts,
        expert_hidden=hidden,
        group_size=1,
        num_selected=selected,
        capacity_factor=None,
        execution=Execution(exchange or "all_gather", "sorted", matmul),
    )
    x = jnp.ones((8, tokens // 8, width))

    def output(variables, x):
        y = layer.apply(variables, x, train=False)
        return jnp.sum(jnp.asarray(y))

    variables = jax.eval_shape(
        lambda: nn.unbox(layer.init(jax.random.key(0), x, train=False))
    )
    mesh = make_mesh(expert=4, data=2, devices=jax.devices())
    with contextlib.nullcontext() if exchange is None else jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(jax.grad(output, argnums=(0, 1)))(variables, x)
    experts = 2 * 2 * tokens * selected * width * hidden
    router = 2 * tokens * width * num_experts
    # A forward pass and twice as much for the gradients of inputs and weights.
    assert count_flops(jaxpr) == 3 * (experts + router)
