"""Times the ways to carry out a layer of experts on one GPU, and a whole training step.

    python benchmarks/moe_gpu.py

Prints a table of milliseconds, of operations a second, and of these as a part of what
the device reaches in one large product in the same run. The layer is that of a ViT-B/16
with 32 experts of which a token goes to two, forward and backward in bfloat16, against
a dense MLP of the same activated FLOPs. The step is that of ``vision_moe:base_1b`` with
a batch for one device, once for each way and once with such MLPs where the experts are.
`mtl_jax.layers.moe.execution.choose` should name the fastest.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.flops import count_flops
from mtl_jax.layers.mlp import Mlp
from mtl_jax.layers.moe import MoE, grouped_matmul
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.train.program import build_program

ROOT = Path(__file__).parent.parent
WAYS = {
    "one-hot products": (1.25, Execution("all_gather", "one_hot")),
    "buffers": (1.25, Execution("all_gather", "buffers")),
    "sorted, blocks": (None, Execution("all_gather", "sorted")),
    "sorted, hopper, 1.25": (1.25, Execution("all_gather", "sorted", "hopper")),
    "sorted, hopper": (None, Execution("all_gather", "sorted", "hopper")),
    "sorted, ragged_dot": (None, Execution("all_gather", "sorted", "ragged_dot")),
}
"""Name -> capacity factor and way."""

DENSE = "dense"
"""Name of an MLP in the place of experts."""


class DenseMlp(nn.Module):
    """An MLP that is called as a layer of experts is."""

    hidden: int
    dtype: Any = jnp.float32
    num_tasks: int | None = None
    group_size: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, task: Any = None, condition: Any = None, *, train: bool
    ) -> jax.Array:
        return Mlp(self.hidden, dtype=self.dtype, name="mlp")(x)


def main() -> None:
    parser = argparse.ArgumentParser(description="Experts on one GPU, in all ways.")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--tokens", type=int, default=196, help="of an image")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--product", type=int, default=8192, help="edge of the product")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each")
    parser.add_argument("--calls", type=int, default=10, help="of each in a turn")
    parser.add_argument("--variant", default="base_1b", help="of vision_moe")
    parser.add_argument(
        "--what", nargs="+", choices=["layer", "step"], default=["layer", "step"]
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    if not grouped_matmul.is_hopper():
        print("The kernels for Hopper GPUs are left out, as this is none.")
        options.ways = [name for name in options.ways if "hopper" not in name]
    time_all = functools.partial(
        alternating, rounds=options.rounds, calls=options.calls
    )
    edge = options.product
    matrix = jax.random.normal(jax.random.key(0), (edge, edge), jnp.bfloat16)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    peak = 2 * edge**3 / time_all({"": lambda: product(matrix, matrix)})[""]
    print(f"product of {edge}: {peak / 1e12:.2f} TFLOP/s\n", flush=True)
    for what, make in (("layer", layers), ("step", steps)):
        if what in options.what:
            runs = make(options)
            seconds = time_all({name: run for name, (run, _) in runs.items()})
            report(what, seconds, {name: n for name, (_, n) in runs.items()}, peak)


def layers(options: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> forward and backward pass of a layer, and its operations."""
    shape = options.batch, options.tokens, options.width
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    hidden, selected = 4 * options.width, 2
    # Gates that are somewhat sure of themselves, hence somewhat uneven load.
    scale = 0.5 / math.sqrt(options.width)
    router = functools.partial(
        NoisyTopK,
        gate=functools.partial(Gate, kernel_init=nn.initializers.normal(scale)),
    )
    modules: dict[str, nn.Module] = {
        DENSE: DenseMlp(hidden * selected, dtype=jnp.bfloat16)
    }
    for name in options.ways:
        factor, way = WAYS[name]
        modules[name] = MoE(
            num_experts=options.experts,
            expert_hidden=hidden,
            group_size=1,
            num_selected=selected,
            router=router,
            capacity_factor=factor,
            dtype=jnp.bfloat16,
            execution=way,
        )
    return {name: layer(module, x) for name, module in modules.items()}


def layer(module: nn.Module, x: jax.Array) -> tuple[Callable[[], Any], int]:
    init = functools.partial(module.init, train=False)
    variables = nn.unbox(jax.jit(init)(jax.random.key(1), x))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y: Any = module.apply({"params": params}, x, train=False)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    traced = both.trace(variables["params"], x)
    program = traced.lower().compile()
    return lambda: program(variables["params"], x), count_flops(traced.jaxpr)


def steps(options: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> training step of a whole model, and its operations."""
    sys.path.insert(0, str(ROOT))
    from configs import vision_moe

    config = vision_moe.VARIANTS[options.variant]()
    config.mixture.batch_size = config.evaluation_batch_size = options.batch
    experiment = fdl.build(config)
    experts = experiment.trunk.moe
    keywords = experts.keywords
    hidden = keywords["num_selected"] * keywords["expert_hidden"]
    layers: dict[str, Callable[..., nn.Module]] = {
        DENSE: functools.partial(DenseMlp, hidden)
    }
    for name in options.ways:
        capacity_factor, way = WAYS[name]
        layers[name] = functools.partial(
            experts, capacity_factor=capacity_factor, execution=way
        )
    found, states = {}, {}
    for name, moe in layers.items():
        trunk = experiment.trunk.clone(moe=moe)
        program = build_program(
            dataclasses.replace(experiment, trunk=trunk), jax.devices()[:1]
        )
        compiled, flops = program.compile_step(keep_state=True)
        # All ways to carry out experts take the same one.
        what = name if name == DENSE else "experts"
        if what not in states:
            states[what] = program.init_state()
        batch = jax.tree.map(example, program.abstract_batch())
        run = functools.partial(compiled, states[what], batch)
        found[name] = (lambda run=run: run()[1]), flops
    return found


def example(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Random values, as chips are faster on equal ones; ones where they are classes."""
    if not np.issubdtype(leaf.dtype, np.floating):
        return np.ones(leaf.shape, leaf.dtype)
    return np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype)


def report(
    what: str, seconds: dict[str, float], flops: dict[str, int], peak: float
) -> None:
    """Prints a line for each."""
    fastest = min(seconds.values())
    print(f"{what:22} {'ms':>9} {'TFLOP':>8} {'TFLOP/s':>8} {'of peak':>8}  x fastest")
    for name, time_taken in seconds.items():
        rate = flops[name] / time_taken
        print(
            f"{name:22} {1e3 * time_taken:9.3f} {flops[name] / 1e12:8.4f} "
            f"{rate / 1e12:8.3f} {rate / peak:8.1%} {time_taken / fastest:10.2f}"
        )
    print(flush=True)


def alternating(
    runs: dict[str, Callable[[], Any]], rounds: int, calls: int
) -> dict[str, float]:
    """Median seconds of a call of each, taken in turns of several calls."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready([run() for _ in range(calls)])
            times[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
