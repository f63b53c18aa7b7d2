"""One process of several: trains a small experiment in one folder after another.

    python one_of_several.py COORDINATOR NUM_PROCESSES PROCESS_ID FOLDER[:EVENT:STEP]...

After STEP, process 0 or the last one is killed, or the last one interrupted, or the
disk is full for process 0; then the run is saved in FOLDER_elsewhere.
"""

import dataclasses
import errno
import json
import os
import signal
import sys
from pathlib import Path

import jax
import pytest
from small import Tiles, experiment

from mtl_jax import optim
from mtl_jax.data import Component, Mixture
from mtl_jax.sharding import distributed
from mtl_jax.sharding.leaving import leaving_at_once
from mtl_jax.train import (
    Fallback,
    MeshShape,
    RunFolder,
    RunFolderError,
    StoppedError,
    StopSignals,
    UnwritableError,
    build_program,
    check_fallback,
    loop,
    train,
)
from mtl_jax.train.program import Program
from mtl_jax.train.progress import ProgressDisplay

NUM_DEVICES = 4
PLACE, UPDATE, APPEND = Program.place, ProgressDisplay.update, RunFolder.append


def build():
    """Experts on all eight devices; the balancer's state has a PRNG key."""
    labels = ("bright", "redness")
    tasks = tuple(task for task in experiment().tasks if task.name in labels)
    tiles = Component(Tiles(), Tiles(20, 2), labels)
    return build_program(
        experiment(
            tasks=tasks,
            mixture=Mixture({"tiles": tiles}, batch_size=16),
            num_routers=None,
            num_experts=8,
            mesh=MeshShape(data=1, expert=8),
            aggregator=optim.rlw,
            num_steps=4,
            evaluate_every=2,
            evaluation_examples=10,
        )
    )


def main(coordinator, num_processes, process_id, *folders):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_traceback_in_locations_limit", 1)
    distributed.initialize(coordinator, int(num_processes), int(process_id))
    distributed.SHARED_SECONDS = 0.5
    with leaving_at_once():
        agree(Path(folders[0].partition(":")[0]))
        program = build()
        compile_once(program)
        for item in folders:
            path, _, event = item.partition(":")
            note_reads(Path(path) / f"read_{process_id}.jsonl")
            if (Path(path) / loop.METRICS).exists():
                # Nobody looks at those of a run that continues.
                loop.collect_samples = lambda *_: {}
            fallback = Fallback(Path(f"{path}_elsewhere"), {})
            if event.startswith("full"):
                fill(Path(path), event.partition(":")[2])
            elif event:
                program = endless(program)
                arrange(*event.split(":"))
            folder = RunFolder(Path(path), writes=distributed.is_main())
            try:
                with StopSignals() as signals:
                    train(program, folder, "small", signals=signals, fallback=fallback)
            except StoppedError as error:
                print(f"{error} in {path}")
            except UnwritableError as error:
                print(error)


def agree(folder):
    """What all have in common is accepted; what one has alone is refused by all."""
    distributed.check_same({"seed": 0})
    distributed.check_shared(folder)
    alone = folder / f"of_process_{jax.process_index()}"
    alone.mkdir(exist_ok=True)
    for check, argument, message in (
        (distributed.check_same, {"seed": jax.process_index()}, "another config"),
        (distributed.check_shared, alone, "process 1 does not see"),
    ):
        with pytest.raises(ValueError, match=message):
            check(argument)
    assert sorted(alone.iterdir()) == []

    run, elsewhere = folder / "run", folder / "elsewhere"
    check_fallback(elsewhere, run)
    # It is process 0 that removes it again.
    assert not distributed.is_main() or not elsewhere.exists()
    for path, message in ((run / "inside", "in the run folder"), (alone, "the same")):
        with pytest.raises(RunFolderError, match=message):
            check_fallback(path, run)


def compile_once(program):
    step, evaluate = program.compile_step(), loop.make_evaluate(program)
    Program.compile_step = lambda self: step
    loop.make_evaluate = lambda program: evaluate


def endless(program):
    chosen = dataclasses.replace(program.experiment, num_steps=1_000_000)
    return dataclasses.replace(program, experiment=chosen)


def note_reads(path):
    """Writes down which records this process reads for each step."""

    def noting(self, examples):
        if isinstance(examples, dict):
            indices = {name: part.index.tolist() for name, part in examples.items()}
            with path.open("a") as file:
                file.write(json.dumps(indices) + "\n")
        return PLACE(self, examples)

    Program.place = noting


def arrange(event, step):
    """Lets something happen to a process when it has logged a step."""
    victim, number = {
        "kill": (0, signal.SIGKILL),
        "kill_last": (jax.process_count() - 1, signal.SIGKILL),
        "interrupt": (jax.process_count() - 1, signal.SIGINT),
    }[event]

    def update(self, logged, *arguments, **keywords):
        UPDATE(self, logged, *arguments, **keywords)
        if logged == int(step) and jax.process_index() == victim:
            os.kill(os.getpid(), number)

    ProgressDisplay.update = update


def fill(path, step):
    """Lets no line fit in a folder's logs once a step is logged."""

    def update(self, logged, *arguments, **keywords):
        UPDATE(self, logged, *arguments, **keywords)
        if logged == int(step):
            RunFolder.append = append

    def append(self, name, line):
        if self.path == path and jax.process_index() == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        APPEND(self, name, line)

    ProgressDisplay.update = update


if __name__ == "__main__":
    main(*sys.argv[1:])
