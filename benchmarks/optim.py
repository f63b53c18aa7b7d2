"""Times task-gradient methods against TorchJD and LibMTL, in one process on one core.

    pip install -e '.[benchmarks]'
    python benchmarks/optim.py

Writes docs/speed.md. Every row is a ratio of two times taken in turns in this process;
absolute times are those of the core it happened to run on. LibMTL is taken as it is on
the package index (1.1.5).
"""

import argparse
import functools
import importlib
import importlib.util
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One core for both libraries, before either makes its threads.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchjd.aggregation as peer
from torchjd.autojac import jac_to_grad, mtl_backward

from mtl_jax import optim

# LibMTL's own __init__ imports a module that torchvision no longer has.
spec = importlib.util.find_spec("LibMTL")
sys.modules["LibMTL"] = types.ModuleType("LibMTL")
sys.modules["LibMTL"].__path__ = spec.submodule_search_locations  # type: ignore
libmtl = importlib.import_module("LibMTL.weighting")

ROOT = Path(__file__).parent.parent
NUM_TASKS, NUM_CLASSES = 3, 10

METHODS: dict[str, tuple[Callable, Callable]] = {
    "pcgrad": (optim.pcgrad, lambda k: peer.PCGrad()),
    "gradvac": (optim.gradvac, lambda k: peer.GradVac()),
    "mgda": (optim.mgda, lambda k: peer.MGDA()),
    "cagrad": (lambda k: optim.cagrad(k, c=0.4), lambda k: peer.CAGrad(c=0.4)),
    "imtl_g": (optim.imtl_g, lambda k: peer.IMTLG()),
    "aligned_mtl": (optim.aligned_mtl, lambda k: peer.AlignedMTL()),
    "upgrad": (optim.upgrad, lambda k: peer.UPGrad()),
    "dualproj": (optim.dualproj, lambda k: peer.DualProj()),
    "conflict_free": (optim.conflict_free, lambda k: peer.ConFIG()),
    "pcd": (optim.pcd, lambda k: peer.PCD()),
    "fairgrad": (
        lambda k: optim.fairgrad(k, alpha=2.0),
        lambda k: peer.FairGrad(alpha=2.0),
    ),
    "nash_mtl": (optim.nash_mtl, lambda k: peer.NashMTL(n_tasks=k)),
}
"""Name -> (ours, TorchJD's), each made for a number of tasks."""

LIBMTL = {
    "pcgrad": (libmtl.PCGrad, {}),
    "gradvac": (libmtl.GradVac, {"beta": 0.5}),
    "mgda": (libmtl.MGDA, {"mgda_gn": "none"}),
    "cagrad": (libmtl.CAGrad, {"calpha": 0.4, "rescale": 0}),
    "imtl_g": (libmtl.IMTL, {}),
}
"""Name -> LibMTL's class and the arguments of its `backward`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "speed.md")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = PAGE.format(
        machine=f"{platform.machine()}, {jax.devices()[0].device_kind}, one core",
        versions=f"jax {jax.__version__}, torch {torch.__version__}",
        weights=weights_table(options.rounds),
        steps=steps_table(options.rounds),
    )
    options.output.write_text(text)
    print(f"wrote {options.output}")


def in_turns(functions: dict[str, Callable[[], Any]], rounds: int, seconds: float):
    """Median seconds a call of each function, measured in turns.

    Args:
      functions: Name -> what to time; it returns when the work is done.
      rounds: Turns that each gets.
      seconds: About how long a turn lasts.
    """
    calls = {}
    for name, function in functions.items():
        function()
        started = time.perf_counter()
        function()
        once = max(time.perf_counter() - started, 1e-7)
        calls[name] = max(1, min(200, round(seconds / once)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - started) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def weights_table(rounds: int) -> str:
    """Aggregation of a small matrix of task gradients: the solver is what is timed."""
    rows = []
    for name, (make_ours, make_peer) in METHODS.items():
        cells = [f"`{name}`"]
        for num_tasks in (3, 8, 40):
            matrix = conflicting_rows(num_tasks)
            aggregator = make_ours(num_tasks)
            state = aggregator.init(jnp.zeros(matrix.shape[1]))
            gradients = jnp.asarray(matrix)
            update = jax.jit(aggregator.update)
            other, tensor = make_peer(num_tasks), torch.tensor(matrix)
            times = in_turns(
                {
                    "ours": lambda: jax.block_until_ready(update(gradients, state)),  # noqa: B023
                    "theirs": lambda: other(tensor),  # noqa: B023
                },
                rounds,
                0.02,
            )
            cells.append(
                f"{1e3 * times['ours']:.3f} / {1e3 * times['theirs']:.3f} "
                f"(**{times['theirs'] / times['ours']:.1f}×**)"
            )
        print(*cells, flush=True)
        rows.append(cells)
    return table(["method", "K = 3", "K = 8", "K = 40"], rows)


def conflicting_rows(num_tasks: int) -> np.ndarray:
    """Task gradients of which about half the pairs conflict, float32."""
    rng = np.random.default_rng(num_tasks)
    rows = rng.normal(size=(num_tasks, 2 * num_tasks))
    rows *= np.geomspace(1, 10, num_tasks)[:, None]
    return rows.astype(np.float32)


class Convolutional(nn.Module):
    """A small convolutional trunk."""

    @nn.compact
    def __call__(self, x):
        for features in (32, 64, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return x.mean((1, 2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, deterministic=True)(y, y)
        y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(y))


class Transformer(nn.Module):
    """A small vision transformer trunk."""

    width: int = 128
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (4, 4), strides=(4, 4))(x)
        x = x.reshape(len(x), -1, self.width)
        shape = (1, *x.shape[1:])
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        for _ in range(self.depth):
            x = Block(self.width)(x)
        return nn.LayerNorm()(x).mean(1)


class PeerTransformer(torch.nn.Module):
    """The same transformer in torch."""

    def __init__(self, width: int = 128, depth: int = 4):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, width, 4, stride=4)
        self.position = torch.nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "norm1": torch.nn.LayerNorm(width),
                    "qkv": torch.nn.Linear(width, 3 * width),
                    "out": torch.nn.Linear(width, width),
                    "norm2": torch.nn.LayerNorm(width),
                    "up": torch.nn.Linear(width, 4 * width),
                    "down": torch.nn.Linear(4 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            batch, tokens, width = x.shape
            qkv = block["qkv"](block["norm1"](x)).reshape(batch, tokens, 3, 4, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + block["out"](y.transpose(1, 2).reshape(batch, tokens, width))
            y = torch.nn.functional.gelu(
                block["up"](block["norm2"](x)), approximate="tanh"
            )
            x = x + block["down"](y)
        return self.norm(x).mean(1)


def peer_convolutional() -> torch.nn.Module:
    """The same convolutional trunk in torch."""
    layers: list[torch.nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [
            torch.nn.Conv2d(inputs, outputs, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.AvgPool2d(2),
        ]
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )


MODELS = {
    "CNN": (Convolutional(), peer_convolutional, 64, 32),
    "ViT": (Transformer(), PeerTransformer, 128, 16),
}
"""Name -> (trunk, torch trunk, width of the features, batch size)."""


def our_steps(trunk: nn.Module, width: int, batch: int) -> dict[str, Callable]:
    """Training steps with our methods: name -> call that returns when it is done."""
    images = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    labels = jax.random.randint(jax.random.key(1), (NUM_TASKS, batch), 0, NUM_CLASSES)
    trunk_params = trunk.init(jax.random.key(2), images)
    heads = jax.random.normal(jax.random.key(3), (NUM_TASKS, width, NUM_CLASSES)) * 0.1
    params = trunk_params, heads
    optimizer = optax.sgd(1e-3)

    def task_losses(features, heads):
        logits = jnp.einsum("bd,kdc->kbc", features, heads)
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits, labels), 1
        )

    def plain(params, state):
        def total(params):
            features = trunk.apply(params[0], images)
            return jnp.sum(task_losses(features, params[1]))

        gradient = jax.grad(total)(params)
        return optax.apply_updates(params, optimizer.update(gradient, state[1])[0])

    def heads_backward(params):
        features, pull_back = jax.vjp(lambda p: trunk.apply(p, images), params[0])
        losses, pull_heads = jax.vjp(task_losses, features, params[1])
        rows, head_rows = zip(*map(pull_heads, jnp.eye(NUM_TASKS)), strict=True)
        return losses, jnp.stack(rows), sum(head_rows), pull_back

    def at_params(aggregator, params, state):
        losses, rows, head_gradient, pull_back = heads_backward(params)
        pulled = [pull_back(row)[0] for row in rows]
        task_gradients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pulled)
        gradient, _ = aggregator.update(task_gradients, state[0], losses=losses)
        updates, _ = optimizer.update((gradient, head_gradient), state[1])
        return optax.apply_updates(params, updates)

    def at_features(aggregator, params, state):
        losses, rows, head_gradient, pull_back = heads_backward(params)
        combined, _ = aggregator.update(rows, state[0], losses=losses)
        gradient = pull_back(combined)[0]
        updates, _ = optimizer.update((gradient, head_gradient), state[1])
        return optax.apply_updates(params, updates)

    def timed(function, aggregator_state):
        state = aggregator_state, optimizer.init(params)
        compiled = jax.jit(function).lower(params, state).compile()
        return lambda: jax.block_until_ready(compiled(params, state))

    steps = {"plain sum": timed(plain, None)}
    for name, (make, _) in METHODS.items():
        aggregator = make(NUM_TASKS)
        for place, step in (("params", at_params), ("features", at_features)):
            like = trunk_params if place == "params" else jnp.zeros((batch, width))
            steps[f"{name} at {place}"] = timed(
                lambda p, s, step=step, aggregator=aggregator: step(aggregator, p, s),
                aggregator.init(like),
            )
    return steps


def their_steps(make_trunk: Callable, width: int, batch: int) -> dict[str, Callable]:
    """The same training steps in torch: plain, with TorchJD and with LibMTL."""
    torch.manual_seed(0)
    trunk = make_trunk()
    heads = torch.nn.ModuleList(
        torch.nn.Linear(width, NUM_CLASSES) for _ in range(NUM_TASKS)
    )
    images = torch.randn(batch, 3, 32, 32)
    labels = torch.randint(0, NUM_CLASSES, (NUM_TASKS, batch))
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def forward():
        optimizer.zero_grad()
        features = trunk(images)
        losses = [
            torch.nn.functional.cross_entropy(head(features), labels[k])
            for k, head in enumerate(heads)
        ]
        return features, losses

    def plain():
        _, losses = forward()
        sum(losses).backward()
        optimizer.step()

    def torchjd(aggregator):
        features, losses = forward()
        mtl_backward(losses, features=features)
        jac_to_grad(trunk.parameters(), aggregator)
        optimizer.step()

    def one_by_one(weighting, arguments):
        _, losses = forward()
        weighting.backward(torch.stack(losses), **arguments)
        optimizer.step()

    steps: dict[str, Callable] = {"plain sum": plain}
    for name, (_, make) in METHODS.items():
        steps[f"{name} by TorchJD"] = functools.partial(torchjd, make(NUM_TASKS))
    for name, (cls, arguments) in LIBMTL.items():
        weighting = cls()
        weighting.task_num, weighting.device = NUM_TASKS, torch.device("cpu")
        weighting.rep_grad, weighting.epoch = False, 0
        weighting.get_share_params = trunk.parameters
        weighting.zero_grad_share_params = functools.partial(
            trunk.zero_grad, set_to_none=False
        )
        weighting.init_param()
        steps[f"{name} by LibMTL"] = functools.partial(one_by_one, weighting, arguments)
    return steps


def steps_table(rounds: int) -> str:
    """Whole training steps with three tasks, each over its own plain sum."""
    parts = []
    for model, (trunk, make_peer, width, batch) in MODELS.items():
        ours = our_steps(trunk, width, batch)
        theirs = their_steps(make_peer, width, batch)
        mine, other = ours.pop("plain sum"), theirs.pop("plain sum")
        columns = ("at params", "at features", "by TorchJD", "by LibMTL")
        rows = []
        for name in METHODS:
            steps = {
                column: (ours | theirs)[f"{name} {column}"]
                for column in columns
                if f"{name} {column}" in ours | theirs
            }
            times = in_turns({"ours": mine, "theirs": other, **steps}, rounds, 0.05)
            cells = [f"`{name}`"]
            for column in columns:
                base = times["ours" if column.startswith("at") else "theirs"]
                cells.append(
                    f"{1e3 * times[column]:.1f} ms (**{times[column] / base:.2f}×**)"
                    if column in times
                    else "–"
                )
            rows.append(cells)
            print(model, *cells, flush=True)
        times = in_turns({"ours": mine, "theirs": other}, rounds, 0.1)
        header = ["method", "at parameters", "at features", "TorchJD", "LibMTL"]
        parts.append(
            f"### {model}, batch {batch}\n\n"
            f"A plain sum takes {1e3 * times['ours']:.1f} ms here and "
            f"{1e3 * times['theirs']:.1f} ms in torch.\n\n" + table(header, rows)
        )
    return "\n\n".join(parts)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGE = """# Speed of the methods

Written by `python benchmarks/optim.py` ({machine}; {versions}). Both libraries run in
one process on the same core, in turns; each number is the median over turns. The ratio
is what carries over to another machine.

## Solvers

Aggregating `K` task gradients of `2 K` numbers, about half of whose pairs conflict:
milliseconds with mtl_jax / with TorchJD, and how many times faster mtl_jax is.

{weights}

## Training steps

Three classification tasks with a shared trunk: forward, backward, aggregation and an
SGD update, in milliseconds and as a multiple of the same library's plain sum of losses.
TorchJD's are `mtl_backward` and `jac_to_grad`; LibMTL's go through its
weighting classes.

{steps}
"""

if __name__ == "__main__":
    main()
