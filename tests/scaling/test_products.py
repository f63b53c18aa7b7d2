"""Operations of products as XLA writes them, by hand."""

import jax
import jax.numpy as jnp
import pytest

from mtl_jax.scaling.hlo import parse
from mtl_jax.scaling.products import device_flops


def flops(left, right, line):
    return device_flops(
        parse(f"""
ENTRY %main (x: f32{left}, y: f32{right}) -> f32[] {{
  %x = f32{left} parameter(0)
  %y = f32{right} parameter(1)
  ROOT %z = {line}
}}
""")
    )


@pytest.mark.parametrize(
    ("left", "right", "line", "expected"),
    [
        # [3, 5] times [5, 7].
        (
            *("[3,5]", "[5,7]"),
            "f32[3,7]{1,0} dot(%x, %y), lhs_contracting_dims={1}, "
            "rhs_contracting_dims={0}",
            2 * 3 * 5 * 7,
        ),
        (
            *("[3,5]", "[5,7]"),
            "f32[3,7]{1,0} convolution(%x, %y), dim_labels=bf_io->bf",
            2 * 3 * 5 * 7,
        ),
        # Four products of [3, 5] and [5, 7]: the window of 4 meets one element of the
        # batch, spread out by 4, at each output position 3 apart.
        (
            *("[4,3,5]", "[4,5,7]"),
            "f32[4,3,7]{2,1,0} convolution(%x, %y), "
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            4 * 2 * 3 * 5 * 7,
        ),
        # A 3 x 3 kernel on 8 x 8 pixels, padded by one: of 3 positions, 2 at each edge.
        (
            *("[1,8,8,2]", "[3,3,2,5]"),
            "f32[1,8,8,5]{3,2,1,0} convolution(%x, %y), "
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 5 * 2 * (3 * 8 - 2) ** 2,
        ),
    ],
)
def test_products(left, right, line, expected):
    assert flops(left, right, line) == expected


def test_products_of_a_program_that_is_compiled_here():
    def step(x, kernels):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, kernels)[0]

    # Small enough that XLA for CPU leaves the products as they are.
    x, kernels = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    compiled = jax.jit(step).lower(x, kernels).compile()
    assert device_flops(parse(compiled.as_text())) == 5 * 2 * 4 * 8 * 8
