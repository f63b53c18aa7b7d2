"""Compares the kernels for Hopper GPUs with NumPy, and a layer with itself.

    JAX_PLATFORMS=cuda python tests/layers/moe/on_hopper.py

Prints a line for each comparison, with the relative error of a product and of its two
gradients, and fails where one is larger than bfloat16 explains.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.layers.mlp import Mlp, SwiGlu
from mtl_jax.layers.moe import MoE, grouped_matmul
from mtl_jax.layers.moe.execution import Execution

COUNTS = {
    "uneven, with rows behind them": [0, 300, 1, 0, 255, 129, 0, 200],
    "all rows on one": [0, 0, 0, 640, 0],
    "no rows": [0, 0, 0],
}


def main() -> None:
    assert grouped_matmul.is_hopper(), jax.devices()
    for (name, count), (width, features) in itertools.product(
        COUNTS.items(), [(256, 384), (384, 128)]
    ):
        compare_product(f"{name}, {width} x {features}", count, width, features)
    for expert, capacity_factor in itertools.product((Mlp, SwiGlu), (None, 1.0)):
        compare_layer(expert, capacity_factor)


def compare_product(name, count, width, features) -> None:
    random = np.random.default_rng(0)
    num_rows, num_experts = 1000, len(count)
    rows, kernel, cotangent = (
        jnp.asarray(random.normal(size=shape), jnp.bfloat16)
        for shape in (
            (num_rows, width),
            (num_experts, width, features),
            (num_rows, features),
        )
    )
    there = (np.arange(num_rows) < sum(count))[:, None]

    @jax.jit
    def both(rows, kernel, cotangent):
        product, pull_back = jax.vjp(
            lambda rows, kernel: jnp.where(
                there, grouped_matmul.hopper(rows, kernel, jnp.asarray(count)), 0
            ),
            rows,
            kernel,
        )
        return product, *pull_back(cotangent)

    exact = [np.asarray(array, np.float64) for array in (rows, kernel, cotangent)]
    found = [np.asarray(array) for array in both(rows, kernel, cotangent)]
    check(name, found, by_numpy(*exact, count))


def by_numpy(rows, kernel, cotangent, count):
    product, rows_gradient = np.zeros_like(cotangent), np.zeros_like(rows)
    kernel_gradient = np.zeros_like(kernel)
    ends = np.cumsum(count)
    for expert, (start, end) in enumerate(zip(ends - count, ends, strict=True)):
        mine = slice(start, end)
        product[mine] = rows[mine] @ kernel[expert]
        rows_gradient[mine] = cotangent[mine] @ kernel[expert].T
        kernel_gradient[expert] = rows[mine].T @ cotangent[mine]
    return product, rows_gradient, kernel_gradient


def compare_layer(expert, capacity_factor) -> None:
    """By the kernels, by blocks, and in float32 by blocks."""
    x = jax.random.normal(jax.random.key(0), (4, 60, 256))
    make = functools.partial(
        MoE, 8, 384, 1, capacity_factor=capacity_factor, expert=expert
    )
    params = nn.unbox(make().init(jax.random.key(1), x, train=False)["params"])
    gate = params["router"]["gate"]["kernel"]
    params["router"]["gate"]["kernel"] = jax.random.normal(
        jax.random.key(2), gate.shape
    )
    ways = {
        "hopper": (jnp.bfloat16, "hopper"),
        "blocks": (jnp.bfloat16, "blocks"),
        "exact": (jnp.float32, "blocks"),
    }
    outputs = {}
    for name, (dtype, matmul) in ways.items():
        layer = make(dtype=dtype, execution=Execution("all_gather", "sorted", matmul))

        def loss(params, x, layer=layer):
            y = layer.apply({"params": params}, x, train=False)
            return jnp.mean(jnp.square(y.astype(jnp.float32))), y

        with jax.default_matmul_precision("highest"):
            gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
        outputs[name] = [np.asarray(leaf) for leaf in jax.tree.leaves((y, gradients))]
    for name in ("hopper", "blocks"):
        what = f"layer of {expert.__name__}, capacity {capacity_factor}, {name}"
        check(what, outputs[name], outputs["exact"])


def check(name, found, expected) -> None:
    errors = []
    for one, other in zip(found, expected, strict=True):
        other = np.asarray(other, np.float64)
        difference = np.linalg.norm(np.asarray(one, np.float64) - other)
        norm = np.linalg.norm(other)
        errors.append(difference / norm if norm else difference)
    print(f"{name}: {' '.join(f'{error:.1e}' for error in errors)}", flush=True)
    assert max(errors) < 0.02, name


if __name__ == "__main__":
    main()
