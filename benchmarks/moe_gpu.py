"""Times the ways to carry out a layer of experts on one GPU, and a whole training step.

    python benchmarks/moe_gpu.py

Prints a table of milliseconds, of operations a second, and of these as a part of what
the device reaches in one large product in the same run. The layer is that of a ViT-B/16
with 32 experts of which a token goes to two, forward and backward in bfloat16, against
a dense MLP of the same activated FLOPs. The step is that of ``vision_moe:base_1b`` with
a batch for one device, once for each way. `mtl_jax.layers.moe.execution.choose` should
name the fastest.

To see what XLA's kernel for grouped products does, set
``JAX_RAGGED_DOT_USE_GPU_PALLAS_TRITON_LOWERING=1``.
"""

import argparse
import dataclasses
import functools
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
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.train.program import build_program

ROOT = Path(__file__).parent.parent
WAYS = {
    "one-hot products": (1.25, Execution("all_gather", "one_hot")),
    "buffers": (1.25, Execution("all_gather", "buffers")),
    "sorted, blocks": (None, Execution("all_gather", "sorted")),
    "sorted, ragged_dot": (None, Execution("all_gather", "sorted", "ragged_dot")),
}
"""Name -> capacity factor and way."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Experts on one GPU, in all ways.")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--tokens", type=int, default=196, help="of an image")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--product", type=int, default=8192, help="edge of the product")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each")
    parser.add_argument("--variant", default="base_1b", help="of vision_moe")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    peak = ceiling(options.product, options.rounds)
    print(f"product of {options.product}: {peak / 1e12:.2f} TFLOP/s\n")
    report("layer", layers(options), options.rounds, peak)
    report("step", steps(options), options.rounds, peak)


def ceiling(edge: int, rounds: int) -> float:
    """Operations a second of one product of square matrices in bfloat16."""
    matrix = jnp.ones((edge, edge), jnp.bfloat16)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    seconds = alternating({"": lambda: product(matrix, matrix)}, rounds)[""]
    return 2 * edge**3 / seconds


def layers(options: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> forward and backward pass of a layer, and its operations."""
    shape = options.batch, options.tokens, options.width
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    hidden, selected = 4 * options.width, 2
    modules: dict[str, nn.Module] = {
        "dense": Mlp(hidden * selected, dtype=jnp.bfloat16)
    }
    for name, (factor, way) in WAYS.items():
        modules[name] = MoE(
            num_experts=options.experts,
            expert_hidden=hidden,
            group_size=1,
            num_selected=selected,
            capacity_factor=factor,
            dtype=jnp.bfloat16,
            execution=way,
        )
    return {name: layer(module, x) for name, module in modules.items()}


def layer(module: nn.Module, x: jax.Array) -> tuple[Callable[[], Any], int]:
    arguments: dict[str, Any] = {"train": False} if isinstance(module, MoE) else {}
    init = functools.partial(module.init, **arguments)
    variables = nn.unbox(jax.jit(init)(jax.random.key(1), x))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y: Any = module.apply({"params": params}, x, **arguments)
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
    found, state = {}, None
    for name, (capacity_factor, way) in WAYS.items():
        moe = functools.partial(
            experiment.trunk.moe, capacity_factor=capacity_factor, execution=way
        )
        trunk = experiment.trunk.clone(moe=moe)
        program = build_program(
            dataclasses.replace(experiment, trunk=trunk), jax.devices()[:1]
        )
        compiled, flops = program.compile_step(keep_state=True)
        # The same for all ways.
        state = program.init_state() if state is None else state
        batch = jax.tree.map(
            lambda leaf: np.ones(leaf.shape, leaf.dtype), program.abstract_batch()
        )
        run = functools.partial(compiled, state, batch)
        found[name] = (lambda run=run: run()[1]), flops
    return found


def report(
    what: str, runs: dict[str, tuple[Callable[[], Any], int]], rounds: int, peak: float
) -> None:
    """Prints a line for each."""
    seconds = alternating({name: run for name, (run, _) in runs.items()}, rounds)
    fastest = min(seconds.values())
    print(f"{what:20} {'ms':>9} {'TFLOP':>8} {'TFLOP/s':>8} {'of peak':>8}  x fastest")
    for name, (_, flops) in runs.items():
        rate = flops / seconds[name]
        print(
            f"{name:20} {1e3 * seconds[name]:9.3f} {flops / 1e12:8.4f} "
            f"{rate / 1e12:8.3f} {rate / peak:8.1%} {seconds[name] / fastest:10.2f}"
        )
    print()


def alternating(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
