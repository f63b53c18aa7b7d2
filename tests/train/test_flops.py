import jax
import jax.numpy as jnp

from mtl_jax.train.flops import count_flops


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
    gradient = jax.make_jaxpr(jax.grad(product, argnums=(0, 1)))(a, b)
    # The product itself and the two of its backward pass.
    assert count_flops(gradient) == 3 * forward


def test_a_convolution():
    def convolve(x, kernel):
        return jax.lax.conv(x, kernel, (1, 1), "SAME")

    jaxpr = jax.make_jaxpr(convolve)(jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3)))
    assert count_flops(jaxpr) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
