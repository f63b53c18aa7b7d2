"""Memory and latency of M³ViT with its experts on the device, on the host, or in part.

    pip install -e '.[tpu]'
    python benchmarks/m3vit.py
    python benchmarks/m3vit.py --here

Writes the table in docs/m3vit.md. Memory is that of programs compiled for a TPU v5e; it
need not be there. Times are of the CPU, in turns in this process, and only their ratios
mean something on another machine. With `--here` memory and times are of the device that
JAX finds, and the table is printed and not written.
"""

import argparse
import functools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from mtl_jax import configuration, scaling
from mtl_jax.layers.moe.streaming import PlacedExperts
from mtl_jax.models import MultitaskModel
from mtl_jax.models.inference import (
    Predictor,
    place_params,
    single_examples,
    task_features,
)

ROOT = Path(__file__).parent.parent
IMAGES = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.uint8)
NUM_EXPERTS = 16
BEGIN, END = "<!-- measured -->", "<!-- end -->"
PLACEMENTS = {
    "all on the device, plain layer": None,
    "8 of 16 on the device": 8,
    "4 of 16 on the device": 4,
    "none: one after another": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="small", choices=["tiny", "small", "base"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "m3vit.md")
    parser.add_argument("--here", action="store_true", help="of the device at hand")
    options = parser.parse_args()
    if options.here:
        # GPUs would multiply in a shorter format, and differences be those of it.
        jax.config.update("jax_default_matmul_precision", "highest")
        device = jax.devices()[0]
    else:
        scaling.prepare_environment()
        device = scaling.make_topology("v5e:2x2").devices[0]
    config = configuration.load_config(f"m3vit:{options.size}", smoke=False)
    model = single_examples(configuration.build(config).model)
    params = jax.eval_shape(
        lambda key: nn.unbox(model.init(key, dict.fromkeys(model.heads, IMAGES))),
        jax.random.key(0),
    )
    times, difference = latencies(model, options.turns)
    memory = {
        name: device_memory(model, params["trunk"], resident, device)
        for name, resident in PLACEMENTS.items()
    }
    machine = f"one {platform.machine()} machine with {os.cpu_count()} cores"
    if options.here:
        machine = f"one {device.device_kind}"
    sizes = expert_bytes(params)
    table = measured(options.size, sizes, memory, times, difference, machine)
    print(table)
    if options.here:
        return
    before, _, rest = options.output.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    options.output.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def expert_bytes(params: Mapping) -> tuple[int, int]:
    """Bytes of one expert, and of all experts of all blocks."""
    blocks = [
        params["trunk"][name]["moe"]["experts"]
        for name in blocks_with_experts(params["trunk"])
    ]
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(blocks))
    return total // (len(blocks) * NUM_EXPERTS), total


def blocks_with_experts(trunk: Mapping) -> list[str]:
    return [
        name
        for name, block in trunk.items()
        if isinstance(block, Mapping) and "moe" in block
    ]


def device_memory(
    model: MultitaskModel, trunk: Mapping, resident: int | None, device: jax.Device
) -> dict[str, float]:
    """What the compiled trunk keeps where, in bytes, and what it copies at a time."""
    here, host = (
        SingleDeviceSharding(device, memory_kind=kind)
        for kind in ("device", "pinned_host")
    )

    def at(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            tree,
        )

    def some(experts: Any, number: int, sharding: Any) -> Any:
        cut = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((number, *leaf.shape[1:]), leaf.dtype),
            experts,
        )
        return at(cut, sharding)

    placed = {name: at(block, here) for name, block in trunk.items()}
    for name in () if resident is None else blocks_with_experts(trunk):
        experts = PlacedExperts(
            some(trunk[name]["moe"]["experts"], resident, here),
            some(trunk[name]["moe"]["experts"], NUM_EXPERTS - resident, host),
            jax.ShapeDtypeStruct((NUM_EXPERTS,), jnp.int32, sharding=here),
        )
        moe = placed[name]["moe"] | {"experts": experts}
        placed[name] = placed[name] | {"moe": moe}
    function = jax.jit(lambda *arguments: task_features(model, *arguments)[0])
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    arguments = placed, at(IMAGES, here), index
    if resident is None:
        # The plain layer chooses its kernels by the platform of the mesh.
        with jax.set_mesh(Mesh(np.array([device]), ("data",))):
            lowered = function.lower(*arguments)
    else:
        name = {"gpu": "cuda"}.get(device.platform, device.platform)
        lowered = function.trace(*arguments).lower(lowering_platforms=(name,))
    compiled = lowered.compile()
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "host": found.host_argument_size_in_bytes,
        "copies": len(re.findall(r" dynamic-slice-start\(", compiled.as_text())),
    }


def latencies(model: MultitaskModel, turns: int) -> tuple[dict[str, float], float]:
    """Time in units of the plain layer's; and the largest relative difference."""
    init = jax.jit(lambda key: model.init(key, dict.fromkeys(model.heads, IMAGES)))
    params = nn.unbox(init(jax.random.key(0)))
    task = next(iter(model.heads))
    images = np.random.default_rng(0).integers(0, 256, IMAGES.shape, dtype=np.uint8)
    blocks = blocks_with_experts(params["trunk"])
    runs: dict[str, Callable[[], Any]] = {}
    for name, resident in PLACEMENTS.items():
        placed = params
        if resident is not None:
            placed = place_params(
                params, (task,), dict.fromkeys(blocks, range(resident))
            )
        predictor = Predictor(model, placed)
        runs[name] = functools.partial(predictor, images, task)
    outputs = {name: np.asarray(run()) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - started)
    plain = next(iter(times))
    found = {
        name: statistics.median(
            ours / theirs for ours, theirs in zip(values, times[plain], strict=True)
        )
        for name, values in times.items()
    }
    scale = np.abs(outputs[plain]).max()
    # Unlike Python's, NumPy's maximum of a NaN is a NaN.
    worst = np.max([np.abs(output - outputs[plain]) for output in outputs.values()])
    return found, float(worst / scale)


def measured(
    size: str,
    experts: tuple[int, int],
    memory: Mapping[str, Mapping[str, float]],
    times: Mapping[str, float],
    difference: float,
    machine: str,
) -> str:
    one, total = (number / 1e6 for number in experts)
    rows = "\n".join(
        f"| {name} | {found['arguments'] / 1e6:.1f} | {found['temporary'] / 1e6:.1f} | "
        f"{found['host'] / 1e6:.1f} | {times[name]:.2f} |"
        for name, found in memory.items()
    )
    streamed = memory[list(memory)[-1]]
    return TABLE.format(
        size=size,
        version=jax.__version__,
        machine=machine,
        one=one,
        total=total,
        rows=rows,
        copies=f"In the last program are {streamed['copies']} copies from the host, "
        "each of one parameter of one\nexpert."
        if streamed["copies"]
        else "",
        difference=f"at most {difference:.0e} of the largest"
        if difference
        else "nothing, to the last bit",
    )


TABLE = """\
`m3vit:{size}`, one image of 512 x 512 pixels, float32: one expert takes {one:.2f} MB,
all of them {total:.0f} MB. Outputs differ from the plain layer's by {difference}.
{copies}

| experts | parameters on the device, MB | working memory, MB | on the host, MB | time |
|---|---|---|---|---|
{rows}

Written by `python benchmarks/m3vit.py` with jax {version}, on
{machine}."""


if __name__ == "__main__":
    main()
