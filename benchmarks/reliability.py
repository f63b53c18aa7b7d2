"""What it costs that runs cannot be lost.

    python benchmarks/reliability.py save_restore
    python benchmarks/reliability.py stall

Each prints a table in Markdown, for docs/reliability.md. `--parameters` makes the state
smaller, to try it. Measure on a machine that does nothing else.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import grain
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.state import TrainState

LAYERS = 12
SECONDS_BEFORE = 10.0
"""Of steps before each save."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["save_restore", "stall"])
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to measure"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.what == "save_restore":
            save_restore(Path(folder), options.parameters, options.repeats)
        else:
            stall(Path(folder), options.parameters, options.repeats)


def make_state(num_parameters: float) -> TrainState:
    """Parameters like those of a transformer, and Adam's moments, of random numbers."""
    width = max(8, round((num_parameters / LAYERS / 12) ** 0.5))
    key = jax.random.key(0)

    def normal(number: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, number), shape)

    def tree(start: int) -> Mapping:
        return {
            f"block_{i}": {
                "attention": normal(start + 3 * i, width, 4 * width),
                "up": normal(start + 3 * i + 1, width, 4 * width),
                "down": normal(start + 3 * i + 2, 4 * width, width),
            }
            for i in range(LAYERS)
        }

    squares = jax.tree.map(jnp.square, tree(2000))
    moments = optax.ScaleByAdamState(jnp.int32(1), tree(1000), squares)
    return jax.block_until_ready(
        TrainState(jnp.int32(1), tree(0), (), (moments,), jax.random.key(1))
    )


def save_restore(folder: Path, num_parameters: float, repeats: int) -> None:
    """Times of saving and restoring, beside those of plain Orbax, in turn."""
    state = make_state(num_parameters)
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    plain_state = dataclasses.asdict(
        dataclasses.replace(state, key=jax.random.key_data(state.key))
    )

    def ours(path: Path) -> tuple[float, float]:
        checkpoints = Checkpoints(path)
        save = seconds(lambda: (checkpoints.save(1, state, data), checkpoints.wait()))
        restore = seconds(lambda: checkpoints.restore_state(1, state))
        checkpoints.close()
        return save, restore

    def plain(path: Path) -> tuple[float, float]:
        with ocp.StandardCheckpointer() as checkpointer:
            save = seconds(
                lambda: (
                    checkpointer.save(path / "1", plain_state),
                    checkpointer.wait_until_finished(),
                )
            )
            restore = seconds(lambda: checkpointer.restore(path / "1", plain_state))
        return save, restore

    times = {"mtl_jax": [], "plain Orbax": []}
    # The first round warms up.
    for number in range(repeats + 1):
        for name, measure in (("mtl_jax", ours), ("plain Orbax", plain)):
            path = folder / f"{name}-{number}".replace(" ", "-")
            times[name].append(measure(path))
            shutil.rmtree(path)
    medians = {
        name: [statistics.median(column) for column in zip(*rows[1:], strict=True)]
        for name, rows in times.items()
    }
    ratios = [
        statistics.median(
            ours[column] / plain[column]
            for ours, plain in zip(*(rows[1:] for rows in times.values()), strict=True)
        )
        for column in range(2)
    ]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(plain_state)) / 1e9
    print(f"\nA state of {size:.2f} GB, median of {repeats} rounds in turn\n")
    print("| | save | restore |\n|---|---|---|")
    for name, (save, restore) in medians.items():
        print(f"| {name} | {save:.2f} s | {restore:.2f} s |")
    print(f"| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def stall(folder: Path, num_parameters: float, saves: int) -> None:
    """What a save takes from training: waiting, and slower steps while it is written.

    Steps right before a save are the measure of those during it, so that what else the
    machine does falls on both alike.
    """
    state = make_state(num_parameters)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) * 3 / 1e9
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    step = make_step(state)
    checkpoints = Checkpoints(folder)
    rows = []
    # The first one warms up.
    for number in range(saves + 1):
        before = []
        while sum(before) < SECONDS_BEFORE:
            state, took = timed(step, state)
            before.append(took)
        began = time.perf_counter()
        checkpoints.save(number, state, data)
        blocked = time.perf_counter() - began
        waiting = threading.Thread(target=checkpoints.wait)
        waiting.start()
        during = []
        while waiting.is_alive():
            state, took = timed(step, state)
            during.append(took)
        usual = statistics.mean(before)
        rows.append((blocked, sum(during), sum(during) - len(during) * usual))
    checkpoints.close()
    blocked, written, slower = (
        statistics.median(column) for column in zip(*rows[1:], strict=True)
    )
    print(f"\nA state of {size:.2f} GB, median of {saves} saves\n")
    print("| | seconds | share of a minute |\n|---|---|---|")
    for name, value in (
        ("training waits for `save`", blocked),
        ("steps take longer meanwhile, in all", slower),
        ("both: what one save a minute takes", blocked + slower),
    ):
        print(f"| {name} | {value:.2f} | {value / 60:.2%} |")
    print(f"\nIt is written in the background in {written:.1f} s.")


def timed(step: Callable, state: TrainState) -> tuple[TrainState, float]:
    start = time.perf_counter()
    return jax.block_until_ready(step(state)), time.perf_counter() - start


def make_step(state: TrainState) -> Callable[[TrainState], TrainState]:
    """An update by Adam that computes much, as those of training do."""
    optimizer = optax.adam(1e-3)
    width = next(iter(state.params.values()))["up"].shape[0]
    inputs = jax.random.normal(jax.random.key(2), (64, width))

    def loss(params: Mapping) -> jax.Array:
        x = inputs
        for block in params.values():
            x += jnp.tanh(x @ block["attention"])[:, :width] / width
            x += jnp.tanh(x @ block["up"]) @ block["down"] / width
        return jnp.mean(x**2)

    def update(state: TrainState) -> TrainState:
        moments = (*state.optimizer_state, optax.EmptyState())
        gradient = jax.grad(loss)(state.params)
        updates, moments = optimizer.update(gradient, moments)
        return dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer_state=moments[:1],
        )

    return jax.jit(update, donate_argnums=0)


if __name__ == "__main__":
    main()
