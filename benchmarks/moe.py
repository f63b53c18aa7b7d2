"""Times the layer of experts on a CPU, against a dense MLP and against V-MoE's layer.

    git clone https://github.com/google-research/vmoe ../vmoe
    python benchmarks/moe.py --vmoe ../vmoe

Writes docs/experts_speed.md. Every figure is a ratio of two times that were taken in
turns in one process, forward and backward, and a median over the turns and over
processes. The dense MLP has as many hidden units as a token's experts have together,
and so the same activated FLOPs. Without ``--vmoe`` its columns are left out.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.layers.mlp import Mlp
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import NoisyTopK

ROOT = Path(__file__).parent.parent
GROUP = 1024
CAPACITY_FACTOR = 1.25
TARGET_DENSE, TARGET_EINSUM = 1.20, 1.5

# Memory that a step frees stays with the process for the next one, as accelerators'
# allocators have it. Otherwise the time of large gradients is half that of the page
# faults of their memory.
MEMORY = ":".join(
    f"glibc.malloc.{name}={2**32}"
    for name in ("mmap_threshold", "trim_threshold", "top_pad")
)

# What the best of seven prototypes reached at 1,024 tokens, on another machine.
BEST_PROTOTYPE = {
    (192, 8, 1): 1.33,
    (192, 16, 2): 1.52,
    (192, 32, 1): 2.01,
    (384, 8, 2): 1.07,
    (384, 16, 2): 1.13,
}


class Cell(NamedTuple):
    """One problem."""

    num_tokens: int
    width: int
    num_experts: int
    num_selected: int


CELLS = [
    Cell(*sizes)
    for sizes in itertools.product((1024, 8192), (192, 384), (8, 16, 32), (1, 2))
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vmoe", type=Path, help="checkout of google-research/vmoe")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "experts_speed.md"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each, at least")
    parser.add_argument(
        "--seconds", type=float, default=4, help="time of a problem, at least"
    )
    parser.add_argument("--processes", type=int, default=3, help="for each problem")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these numbers")
    options = parser.parse_args()
    if options.vmoe is None:
        print("no --vmoe: the columns of V-MoE's dispatchers are left out")
    else:
        load_peer(options.vmoe)
    cells = [c for c in CELLS if not options.tokens or c.num_tokens in options.tokens]
    os.environ["GLIBC_TUNABLES"] = MEMORY
    rows = {}
    for cell in cells:
        rows[cell] = median_of_processes(cell, options)
        print(*cell, {k: round(v, 4) for k, v in rows[cell].items()}, flush=True)
    options.output.write_text(page(rows, options.processes))
    print(f"wrote {options.output}")


def median_of_processes(cell: Cell, options: argparse.Namespace) -> dict[str, float]:
    """Times of each, the dense MLP's in seconds and all others as parts of it.

    Where a process has its memory decides up to a third of a time, so that several have
    to be asked.
    """
    fresh = concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )
    with fresh:
        work = (cell, options.vmoe, options.rounds, options.seconds)
        found = [
            fresh.submit(measure, *work).result() for _ in range(options.processes)
        ]
    dense = statistics.median(times["dense"] for times in found)
    ratios = {
        name: statistics.median(times[name] / times["dense"] for times in found)
        for name in found[0]
    }
    return {"dense": dense} | {
        name: ratio for name, ratio in ratios.items() if name != "dense"
    }


def load_peer(path: Path) -> Any:
    """V-MoE's modules ``moe`` and ``nn.routing``."""
    if not (path / "vmoe" / "moe.py").is_file():
        sys.exit(f"--vmoe {path} is no checkout of google-research/vmoe")
    sys.path.insert(0, str(path))
    return importlib.import_module("vmoe.moe"), importlib.import_module(
        "vmoe.nn.routing"
    )


class PlainMlp(nn.Module):
    """`Mlp` without names of axes, which the peer's lifting does not know."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        hidden = jax.nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(x.shape[-1])(hidden)


class PeerLayer(nn.Module):
    """V-MoE's router and dispatcher around the same experts as ours."""

    peer: Any
    dispatcher: str
    num_experts: int
    num_selected: int
    hidden: int

    @nn.compact
    def __call__(self, groups):
        moe, routing = self.peer
        dispatcher, metrics = routing.NoisyTopExpertsPerItemRouter(
            self.num_experts,
            self.num_selected,
            deterministic=True,
            dispatcher={
                "name": self.dispatcher,
                "capacity_factor": CAPACITY_FACTOR,
                "batch_priority": False,
            },
        )(groups)
        experts = moe.sparse_moe_spmd(
            PlainMlp, variable_axes={"params": 0}, split_rngs={"params": True}
        )(hidden=self.hidden)
        return experts(dispatcher, groups), jnp.mean(metrics["auxiliary_loss"])


def measure(
    cell: Cell, vmoe: Path | None, rounds: int, seconds: float
) -> dict[str, float]:
    """Seconds of a forward and backward pass by name of the layer."""
    peer = None if vmoe is None else load_peer(vmoe)
    num_tokens, width, num_experts, num_selected = cell
    hidden = 4 * width
    group = min(GROUP, num_tokens)
    x = jax.random.normal(jax.random.key(0), (num_tokens // group, group, width))
    # Gates that are somewhat sure of themselves, hence somewhat uneven load.
    scale = 0.5 / math.sqrt(width)
    router = functools.partial(
        NoisyTopK,
        gate=functools.partial(Gate, kernel_init=nn.initializers.normal(scale)),
        noise_std=0.0,
    )
    ours = functools.partial(
        MoE,
        num_experts=num_experts,
        expert_hidden=hidden,
        group_size=1,
        num_selected=num_selected,
        router=router,
    )

    def apply_ours(module):
        def apply(variables, x):
            y, sown = module.apply(variables, x, train=True, mutable=["losses"])
            return y, sown["losses"]["auxiliary"]

        return apply

    dense = Mlp(hidden * num_selected)
    layers: dict[str, tuple[Callable, Callable]] = {
        "dense": (
            dense.init,
            lambda variables, x: (dense.apply(variables, x), jnp.float32(0)),
        )
    }
    for name, factor in (("capacity", CAPACITY_FACTOR), ("dropless", None)):
        module = ours(capacity_factor=factor)
        layers[name] = (functools.partial(module.init, train=False), apply_ours(module))
    if peer is not None:
        for name in ("indices", "einsum"):
            module = PeerLayer(peer, name, num_experts, num_selected, hidden)
            layers[f"vmoe {name}"] = module.init, module.apply
    steps = {}
    with their_promotion():
        for name, (init, apply) in layers.items():
            variables = nn.unbox(jax.jit(init)(jax.random.key(1), x))
            variables = {"params": variables["params"]}
            if name.startswith("vmoe"):
                kernel = variables["params"]["NoisyTopExpertsPerItemRouter_0"]["dense"]
                kernel["kernel"] = scale * jax.random.normal(
                    jax.random.key(2), kernel["kernel"].shape
                )
            steps[name] = compiled(apply, variables, x)
    return alternating(steps, rounds, seconds)


@contextlib.contextmanager
def their_promotion() -> Iterator[None]:
    """The peer mixes types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def compiled(apply: Callable, variables: Any, x: jax.Array) -> Callable[[], Any]:
    cotangent = jax.random.normal(jax.random.key(3), x.shape)

    def loss(variables, x):
        y, auxiliary = apply(variables, x)
        return jnp.sum(y * cotangent) + auxiliary

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    program = step.lower(variables, x).compile()
    return lambda: jax.block_until_ready(program(variables, x))


def alternating(
    steps: dict[str, Callable], rounds: int, seconds: float
) -> dict[str, float]:
    """Median seconds of each, taken in so many turns, and more if they are short."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while len(times["dense"]) < rounds or time.perf_counter() < end:
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def page(rows: dict[Cell, dict[str, float]], processes: int) -> str:
    """The documentation page, with each target and whether it is met."""
    names = [name for name in next(iter(rows.values())) if name != "dense"]
    head = "| tokens | width | experts | selected | dense, ms | " + " | ".join(names)
    lines = [head + " |", "|" + "---:|" * (5 + len(names))]
    for cell, row in rows.items():
        ratios = [f"{row[name]:.2f}" for name in names]
        numbers = [f"{size:,}" for size in cell]
        lines.append(
            "| " + " | ".join([*numbers, f"{1e3 * row['dense']:.1f}", *ratios]) + " |"
        )
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "flax"))
    return PAGE.format(
        machine=processor(),
        processes=processes,
        versions=versions,
        table="\n".join(lines),
        targets="\n".join(f"- {line}" for line in targets(rows)),
    )


def targets(rows: dict[Cell, dict[str, float]]) -> list[str]:
    """What was aimed at, and what it came to."""
    large = {c: r for c, r in rows.items() if c.num_tokens == 8192}
    lines = []
    for name in ("capacity", "dropless") if large else ():
        ratios = {c: r[name] for c, r in large.items()}
        missed = [c for c, ratio in ratios.items() if ratio > TARGET_DENSE]
        lines.append(
            f"{name}, 8,192 tokens: at most {TARGET_DENSE:.2f} times the dense MLP in "
            f"{len(ratios) - len(missed)} of {len(ratios)} cells; the worst is "
            f"{max(ratios.values()):.2f}."
        )
    for (width, experts, selected), best in BEST_PROTOTYPE.items():
        row = rows.get(Cell(1024, width, experts, selected))
        if row is not None:
            lines.append(
                f"1,024 tokens, width {width}, {experts} experts, {selected} selected: "
                f"{row['capacity']:.2f}; the best prototype was "
                f"at {best:.2f} on its machine."
            )
    if "vmoe einsum" in next(iter(rows.values())):
        best = [
            min(r["vmoe indices"], r["vmoe einsum"]) / r["capacity"]
            for r in rows.values()
        ]
        einsum = [r["vmoe einsum"] / r["capacity"] for r in rows.values()]
        slower = sum(ratio < 1 for ratio in best)
        lines += [
            f"V-MoE's better dispatcher takes {min(best):.2f} to {max(best):.2f} times "
            f"as long as ours (capacity), {statistics.geometric_mean(best):.2f} in the "
            f"geometric mean; ours is slower in {slower} of {len(best)} cells.",
            f"V-MoE's einsum takes {statistics.geometric_mean(einsum):.2f} times as "
            f"long in the geometric mean; aimed at {TARGET_EINSUM}.",
        ]
    return lines


def processor() -> str:
    """Name of the processor, as far as the system tells, and the number of cores."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


PAGE = """# Speed of the layer of experts

Forward and backward on a CPU ({machine}; {versions}), as ratios to a dense MLP of the
same activated FLOPs: its hidden units are those that a token's experts have together,
four times the width each. Routing is part of the layer, in groups of 1,024 tokens. Made
by `python benchmarks/moe.py --vmoe PATH`; times are taken in turns in one process, the
ratios are those of medians, and of {processes} processes the median one is shown: where
a process has its memory decides up to a third of a time. It keeps the memory that a
step frees: without that, page faults of fresh memory for gradients dominate where there
are many experts for few tokens, for all of these layers alike.

*capacity* has slots for 1.25 times an even share, as V-MoE's layer has; *dropless* has
no limit. Which layout of rows is used follows from the shapes: few rows an expert lie
in buffers, many are sorted and computed block by block. *vmoe indices* and *vmoe
einsum* are the two dispatchers of google-research/vmoe around the same experts.

{table}

{targets}
"""


if __name__ == "__main__":
    main()
