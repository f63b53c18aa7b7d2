"""Times the layer of experts on a CPU, against a dense MLP and against V-MoE's layer.

    git clone https://github.com/google-research/vmoe ../vmoe
    python benchmarks/moe.py --vmoe ../vmoe

Writes docs/experts_speed.md. Every figure is a ratio of two times that were taken in turns
in this process, forward and backward, and a median over the turns. The dense MLP has as
many hidden units as a token's experts have together, and so the same activated FLOPs.
Without ``--vmoe`` its columns are left out.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import math
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
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these numbers")
    options = parser.parse_args()
    peer = None
    if options.vmoe is None:
        print("no --vmoe: the columns of V-MoE's dispatchers are left out")
    else:
        peer = load_peer(options.vmoe)
    cells = [c for c in CELLS if not options.tokens or c.num_tokens in options.tokens]
    rows = {}
    for cell in cells:
        rows[cell] = measure(cell, peer, options.rounds)
        print(*cell, {k: round(v, 4) for k, v in rows[cell].items()}, flush=True)
    #
    print(f"wrote {options.output}")


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


def measure(cell: Cell, peer: Any, rounds: int) -> dict[str, float]:
    """Seconds of a forward and backward pass by name of the layer."""
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

    layers: dict[str, tuple[nn.Module, Callable]] = {
        "dense": (
            Mlp(hidden * num_selected),
            lambda variables, x: (
                Mlp(hidden * num_selected).apply(variables, x),
                jnp.float32(0),
            ),
        )
    }
    for name, factor in (("capacity", CAPACITY_FACTOR), ("dropless", None)):
        module = ours(capacity_factor=factor)
        layers[name] = (functools.partial(module.init, train=False), apply_ours(module))
    layers["dense"] = (layers["dense"][0].init, layers["dense"][1])
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
    return alternating(steps, rounds)


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


def alternating(steps: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
