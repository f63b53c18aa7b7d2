"""What it costs a training step that runs cannot be lost.

    python benchmarks/step.py
    python benchmarks/step.py earth_digits:dense --rounds 3

Prints a table in Markdown for each config, for docs/reliability.md. Three loops take
turns in one process, on batches that they read themselves:

- the bare step: the same step, compiled with the functions that judge numbers and take
  steps back replaced by ones that do nothing, and no more around it than the batches;
- the step as it is, in the same loop;
- `mtl_jax.train.train`, with log lines, timings, faults, spikes, display and heartbeat,
  and without evaluations and checkpoints, which are not part of a step
  (benchmarks/reliability.py measures the latter).

Only the ratios mean something elsewhere. Measure on a machine that does nothing else.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jax.numpy as jnp

from mtl_jax import configuration
from mtl_jax.data.mixture import training_batches
from mtl_jax.train import (
    Experiment,
    RunFolder,
    build_program,
    gradients,
    step,
    train,
)
from mtl_jax.train.heartbeat import Heartbeat
from mtl_jax.train.program import Program

CONFIGS = ("earth_digits:dense", "earth_digits")
LOOPS = ("the bare step", "with its checks", "`train`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of each loop a round")
    options = parser.parse_args()
    for name in options.configs:
        config = configuration.load_config(name)
        configuration.override(config, options.assignments)
        experiment = configuration.build(config)
        seconds, memory = measure(experiment, options.rounds, options.steps)
        print_table(name, seconds, memory, options.steps)


def measure(
    experiment: Experiment, rounds: int, steps: int
) -> tuple[list[list[float]], list[int]]:
    """Times the loops in turn.

    Args:
      experiment: Its ``log_every`` says how often `train` writes a line.
      rounds: How often each loop takes its turn.
      steps: How many steps are timed in each.

    Returns:
      Seconds of a step for each of `LOOPS`, by round, and the bytes that the two
      compiled steps use while they run.
    """
    settle = experiment.log_every
    experiment = dataclasses.replace(
        experiment,
        num_steps=(rounds + 2) * (2 * settle + steps),
        evaluate_every=10**9,
        checkpoint_every=10**9,
    )
    with without_fault_handling():
        bare = Loop(build_program(experiment), settle)
    checked = Loop(build_program(experiment), settle)
    turns = Turns((bare, checked), settle, rounds, steps)
    headlines = {task.name: task.metrics[0].name for task in experiment.tasks}
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        heartbeat = Heartbeat(folder, experiment.num_steps, headlines)
        with contextlib.suppress(AllMeasuredError):
            train(build_program(experiment), folder, "step", (heartbeat, turns))
    return turns.seconds, [bare.memory, checked.memory]


class AllMeasuredError(Exception):
    """Ends a run that was only there to be measured."""


class Loop:
    """A compiled step, and the least that a loop around it does.

    Args:
      program: Compiled at once.
      settle: Steps before time is taken.
    """

    def __init__(self, program: Program, settle: int):
        experiment = program.experiment
        self._program, self._settle = program, settle
        self._step, _ = program.compile_step()
        self._state = program.init_state()
        self._batches = training_batches(
            experiment.mixture,
            {task.name: task.field for task in experiment.tasks},
            experiment.seed,
            program.share_multiple,
        )
        self.memory = self._step.memory_analysis().temp_size_in_bytes

    def seconds_a_step(self, steps: int) -> float:
        self._take(self._settle)
        started = time.perf_counter()
        self._take(steps)
        return (time.perf_counter() - started) / steps

    def _take(self, steps: int) -> None:
        for _ in range(steps):
            batch = self._program.place(next(self._batches))
            self._state, metrics = self._step(self._state, batch)
        jax.block_until_ready((self._state, metrics))


class Turns:
    """Observes a run: times its steps, and between them those of other loops.

    A line is written while the step after the next one begins, and waits for the step
    that it is about. So where time is taken there is one step under way, at both ends.

    Args:
      loops: The others.
      settle: Steps between two lines, which are also those before time is taken.
      rounds: How often each loop takes its turn.
      steps: How many steps are timed in each; a multiple of ``settle``.
    """

    def __init__(self, loops: Sequence[Loop], settle: int, rounds: int, steps: int):
        if steps % settle:
            raise ValueError(
                f"steps are {steps}; they must be a multiple of log_every, {settle}"
            )
        self.seconds: list[list[float]] = []
        self._loops, self._rounds, self._steps = loops, rounds, steps
        self._settle, self._start, self._started = settle, 0, 0.0
        self._others: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def phase(self, step: int, name: str) -> None:
        pass

    def update(self, step: int, *arguments: Any, **keywords: Any) -> None:
        pass

    def begin(self, step: int) -> None:
        if step % self._settle != 2 % self._settle or step < 2:
            return
        if step == self._start + self._steps:
            taken = (time.perf_counter() - self._started) / self._steps
            self.seconds.append([*self._others, taken])
            if len(self.seconds) == self._rounds:
                raise AllMeasuredError
        if step >= self._start + self._steps:
            self._others = [loop.seconds_a_step(self._steps) for loop in self._loops]
            self._start = step + self._settle
        elif step == self._start:
            self._started = time.perf_counter()


@contextlib.contextmanager
def without_fault_handling() -> Iterator[None]:
    """Steps that are traced meanwhile trust all numbers, and note nothing."""
    with (
        mock.patch.multiple(
            gradients,
            _without_nan=lambda leaf: leaf,
            _if_finite=lambda source, pulled: pulled,
            _judge=trust,
        ),
        mock.patch.multiple(
            step,
            must_skip=lambda *_: jnp.array(False),
            keep_if=lambda condition, before, after: after,
            take_note=lambda state, *_: (state, None),
        ),
    ):
        yield


def trust(
    losses: jax.Array, heads: Mapping, task_gradients: Any, counts: jax.Array
) -> gradients._Verdict:
    """In place of a look at what is finite."""
    return gradients._Verdict(
        counts > 0,
        jnp.zeros_like(counts, bool),
        gradients.gramian(task_gradients),
        heads,
    )


def print_table(
    name: str,
    seconds: Sequence[Sequence[float]],
    memory: Sequence[int],
    steps: int,
) -> None:
    print(f"\n`{name}`, median of {len(seconds)} rounds of {steps} steps in turn\n")
    print("| | time of a step | against the bare one | least, most | working memory |")
    print("|---|---|---|---|---|")
    for number, loop in enumerate(LOOPS):
        took = statistics.median(row[number] for row in seconds)
        ratios = [row[number] / row[0] for row in seconds]
        # What `train` runs is the step as it is.
        working = memory[min(number, 1)] / 1e6
        print(
            f"| {loop} | {took * 1000:.1f} ms | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f}, {max(ratios):.3f} | {working:.1f} MB |"
        )


if __name__ == "__main__":
    main()
