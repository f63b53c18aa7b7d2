"""What it costs that runs cannot be lost.

    python benchmarks/reliability.py save_restore
    python benchmarks/reliability.py stall
    python benchmarks/reliability.py growth

Each prints a table in Markdown, for docs/reliability.md. `--parameters` makes the state
of the first two smaller, to try them; `--repeats` is how many rounds they take. Measure
time on a machine that does nothing else.
"""

import argparse
import dataclasses
import gc
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import grain
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import tensorstore

from mtl_jax.train.checkpoint import FILE_BYTES, Checkpoints
from mtl_jax.train.state import TrainState

LAYERS = 12
SECONDS_BEFORE = 10.0
"""Of steps before each save."""

SMALL = 20_000
"""Parameters of the state whose saves are counted."""

WARM_UP = 60
"""Saves after which all has been seen a few times, and nothing need grow."""

CONVERSIONS = 10_000
"""Of a document of TensorStore's to Python, to see what one of them leaves behind."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["save_restore", "stall", "growth"])
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--saves", type=int, default=240, help="of growth")
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to measure"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.what == "save_restore":
            save_restore(Path(folder), options.parameters, options.repeats)
        elif options.what == "stall":
            stall(Path(folder), options.parameters, options.repeats)
        else:
            growth(Path(folder), options.saves)


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
    plain_state = without_key(state)

    def ours(path: Path) -> tuple[float, float]:
        checkpoints = Checkpoints(path)
        save = seconds(lambda: (checkpoints.save(1, state, data), checkpoints.wait()))
        restore = seconds(lambda: checkpoints.restore_state(1, state))
        checkpoints.close()
        return save, restore

    def defaults(path: Path) -> tuple[float, float]:
        with ocp.StandardCheckpointer() as checkpointer:
            save = seconds(
                lambda: (
                    checkpointer.save(path / "1", plain_state),
                    checkpointer.wait_until_finished(),
                )
            )
            restore = seconds(lambda: checkpointer.restore(path / "1", plain_state))
        return save, restore

    def same_options(path: Path) -> tuple[float, float]:
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        to_save = ocp.args.PyTreeSave(
            plain_state, ocdbt_target_data_file_size=FILE_BYTES
        )
        to_restore = ocp.args.PyTreeRestore(
            plain_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(plain_state),
        )
        with ocp.AsyncCheckpointer(handler) as checkpointer:
            save = seconds(
                lambda: (
                    checkpointer.save(path / "1", args=to_save),
                    checkpointer.wait_until_finished(),
                )
            )
            restore = seconds(lambda: checkpointer.restore(path / "1", args=to_restore))
        return save, restore

    measures = {
        "mtl_jax": ours,
        "Orbax, its defaults": defaults,
        "Orbax, the same handler and options": same_options,
    }
    rounds: list[dict[str, tuple[float, float]]] = []
    # The first round warms up.
    for number in range(repeats + 1):
        rounds.append({})
        for place, (name, measure) in enumerate(measures.items()):
            path = folder / f"{number}-{place}"
            rounds[-1][name] = measure(path)
            shutil.rmtree(path)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(plain_state)) / 1e9
    print(f"\nA state of {size:.2f} GB, median of {repeats} rounds in turn\n")
    print("| | save | restore | mtl_jax against it: save | restore |")
    print("|---|---|---|---|---|")
    for name in measures:
        save, restore = (
            statistics.median(times[name][column] for times in rounds[1:])
            for column in range(2)
        )
        saving, restoring = (
            statistics.median(
                times["mtl_jax"][column] / times[name][column] for times in rounds[1:]
            )
            for column in range(2)
        )
        print(
            f"| {name} | {save:.2f} s | {restore:.2f} s "
            f"| {saving:.2f} | {restoring:.2f} |"
        )


def without_key(state: TrainState) -> dict:
    """The state as Orbax alone takes it."""
    key = jax.random.key_data(state.key)
    return dataclasses.asdict(dataclasses.replace(state, key=key))


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


class Growth(NamedTuple):
    """What one save leaves behind.

    Attributes:
      kilobytes: Of resident memory.
      blocks: Of Python's memory, which hold an object each.
    """

    kilobytes: float
    blocks: float


def growth(folder: Path, saves: int) -> None:
    """Memory that a save keeps, here and in plain Orbax, in a process each."""
    fresh = multiprocessing.get_context("spawn")
    rows, arrays = {}, len(jax.tree.leaves(make_state(SMALL)))
    for name in ("mtl_jax", "plain Orbax"):
        with fresh.Pool(1) as process:
            path = folder / name.replace(" ", "-")
            rows[name] = process.apply(growth_of, (name, path, saves))
    print(f"\n{saves} saves of {arrays} arrays, those after the first {WARM_UP}\n")
    print("| | resident memory a save | blocks of Python's a save |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.kilobytes:+.1f} KB | {row.blocks:+.1f} |")
    print(f"\nTensorStore's `Spec.to_json` keeps {blocks_kept():.2f} blocks a call.")


def growth_of(name: str, path: Path, saves: int) -> Growth:
    """Saves a small state so many times, in this process."""
    state = make_state(SMALL)
    plain_state = without_key(state)
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpoints = manager = None
    if name == "mtl_jax":
        checkpoints = Checkpoints(path)
    else:
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        manager = ocp.CheckpointManager(path, options=options)

    def measure() -> tuple[float, int]:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        resident = status.partition("VmRSS:")[2].split()[0]
        return float(resident), sys.getallocatedblocks()

    before = measure()
    for number in range(1, saves + 1):
        if checkpoints is not None:
            checkpoints.save(number, state, data)
            checkpoints.wait()
        elif manager is not None:
            manager.save(number, args=ocp.args.StandardSave(plain_state))
            manager.wait_until_finished()
        if number == WARM_UP:
            before = measure()
    kilobytes, blocks = (
        (later - earlier) / (saves - WARM_UP)
        for later, earlier in zip(measure(), before, strict=True)
    )
    return Growth(kilobytes, blocks)


def blocks_kept() -> float:
    """Blocks of Python's memory that describing a folder in TensorStore leaves.

    Orbax does so once for each array that it saves.
    """
    spec = tensorstore.KvStore.Spec({"driver": "file", "path": "/"})
    spec.to_json()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(CONVERSIONS):
        spec.to_json()
    gc.collect()
    return (sys.getallocatedblocks() - before) / CONVERSIONS


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
