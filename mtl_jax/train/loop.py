"""Training from the first step, or the last checkpoint, to the result."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from rich.console import Console

from mtl_jax.data.mixture import training_batches
from mtl_jax.sharding.distributed import is_main
from mtl_jax.train.agreement import first_told
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.description import describe
from mtl_jax.train.evaluate import CutShortError, make_evaluate
from mtl_jax.train.experiment import Experiment
from mtl_jax.train.fault_log import SPIKES, FaultLog
from mtl_jax.train.faults import REPORT
from mtl_jax.train.integrity import FIRST
from mtl_jax.train.observer import Observer
from mtl_jax.train.program import Program
from mtl_jax.train.progress import ProgressDisplay
from mtl_jax.train.rescue import Fallback, UnwritableError, Unwritten, rescue
from mtl_jax.train.result import describe_run
from mtl_jax.train.run_folder import (
    RunFolder,
    RunFolderError,
    storage_fault,
    to_json,
)
from mtl_jax.train.samples import collect_samples, write_samples
from mtl_jax.train.state import TrainState
from mtl_jax.train.step import Metrics
from mtl_jax.train.stopping import StoppedError, StopSignals
from mtl_jax.train.timings import Timings

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
UNEVALUATED = "unevaluated.json"
"""What is known of a step whose evaluation a signal cut short."""


def train(
    program: Program,
    folder: RunFolder,
    config_name: str,
    observers: Sequence[Observer] = (),
    *,
    signals: StopSignals | None = None,
    fallback: Fallback | None = None,
    debug_nans: bool = False,
) -> dict:
    """Runs a program to its end, from the newest checkpoint in its folder if any.

    Everything in ``metrics.jsonl`` and in the checkpoints is the same to the last bit
    whether or not the run was interrupted; what depends on the clock is in
    ``timings.jsonl``. The speed and the wall time in the result are those of the whole
    run: what came after the checkpoint that it continued from was lost and counts
    nowhere.

    Args:
      program: What to run, from `mtl_jax.train.build_program`.
      folder: The run's folder.
      config_name: What the result calls the config.
      observers: Who follows the run besides the display in the terminal.
      signals: Lets SIGTERM and SIGINT save the run and stop it; without, they do what
        they do in Python.
      fallback: Where to save the run if its folder cannot be written any more.
      debug_nans: Whether to stop at the first step that is faulty, whatever is done
        about one, and to say which operation made its first NaN.

    Returns:
      The content of ``result.json``.

    Raises:
      RunFolderError: If the folder's logs or checkpoints are damaged, the checkpoint
        is of another config, or the folder cannot be written any more.
      StoppedError: If a signal stopped it; the run is saved as it was then.
      NumericalFaultError: If too many steps in a row were faulty, or the parameters are
        not finite; the checkpoints are from before.
    """
    with contextlib.ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer)
        return _train(
            program,
            folder,
            config_name,
            observers,
            signals or StopSignals(),
            fallback,
            debug_nans,
        )


def _train(
    program: Program,
    folder: RunFolder,
    config_name: str,
    observers: Sequence[Observer],
    signals: StopSignals,
    fallback: Fallback | None,
    debug_nans: bool,
) -> dict:
    started = time.monotonic()
    experiment = program.experiment
    description = describe(program, folder.read_json("config.json"))
    checkpoints = Checkpoints(
        folder.path / CHECKPOINTS, description, keep=experiment.checkpoints_kept
    )
    try:
        state, batches, timings, faults, unevaluated = _start_or_continue(
            program, checkpoints, folder, started
        )
        evaluate = make_evaluate(program)
        console = Console(quiet=not is_main())
        console.print("compiling the training step ...")
        for observer in observers:
            observer.phase(int(state.step), "compiling")
        compile_started = time.monotonic()
        compile_step = (
            program.compile_explained_step if debug_nans else program.compile_step
        )
        step, flops = compile_step()
        compile_seconds = time.monotonic() - compile_started
        first_step = int(state.step)
        headlines = {task.name: task.metrics[0].name for task in experiment.tasks}
        display = ProgressDisplay(headlines, experiment.num_steps, first_step, console)
        loop = _Loop(
            program,
            step,
            evaluate,
            checkpoints,
            folder,
            (display, *observers),
            timings,
            faults,
            signals,
            functools.partial(rescue, folder, description, fallback),
        )
        with signals.held(), display:
            state = loop.run(state, batches, unevaluated)
    except BaseException:
        # What went wrong first is what matters.
        with contextlib.suppress(Exception):
            checkpoints.close()
        raise
    scores = loop.final_scores or evaluate(state.variables, None)
    samples = collect_samples(program, state.variables)
    cost = {
        "flops_per_step": flops,
        "compile_seconds": compile_seconds,
        **timings.average(),
        "wall_time_seconds": timings.wall_time_seconds,
    }
    result = to_json(describe_run(program, config_name, scores, cost))
    _write_results(folder, samples, result)
    return result


def _write_results(
    folder: RunFolder, samples: Mapping[str, np.ndarray], result: Mapping[str, Any]
) -> None:
    """Writes results; all processes say so if they cannot be written."""
    fault = None
    try:
        if is_main():
            write_samples(folder.path / "samples.npz", samples)
        folder.write_json(RESULT, result)
    except OSError as error:
        fault = storage_fault(error) or str(error)
    told = first_told(fault)
    if told is not None:
        raise UnwritableError(
            f"cannot write to the run folder {folder.path} any more: {told}; training "
            "is finished and saved: the same command writes its results once that is "
            "mended"
        )


def _start_or_continue(
    program: Program, checkpoints: Checkpoints, folder: RunFolder, started: float
) -> tuple[
    TrainState, grain.DatasetIterator, Timings, FaultLog, Mapping[str, Any] | None
]:
    experiment = program.experiment
    batches = training_batches(
        experiment.mixture,
        {task.name: task.field for task in experiment.tasks},
        experiment.seed,
        program.share_multiple,
        rows=program.local_rows,
    )
    latest, state = checkpoints.restore_newest(program.fresh_state) or (None, None)
    if latest is None:
        _check_that_it_is_new(folder)
    timings = Timings(experiment.mixture.batch_size, started)
    logged = folder.truncate(
        METRICS, latest or 0, functools.partial(_counted_faults, latest=latest)
    )
    folder.truncate(TIMINGS, latest or 0, timings.resume)
    folder.truncate(SPIKES, latest or 0, lambda line: None)
    unevaluated = _read_unevaluated(folder)
    if unevaluated is not None:
        known = logged and logged[-1]["step"] == latest
        if known or unevaluated["step"] != latest:
            unevaluated = None
        else:
            timings.resume(unevaluated["timing"])
    faults = FaultLog(
        folder.path,
        [task.name for task in experiment.tasks],
        experiment.labels,
        experiment.max_faulty_steps,
        [*logged, *([] if unevaluated is None else [unevaluated["metrics"]])],
    )
    if latest is None or state is None:
        return program.init_state(), batches, timings, faults, None
    checkpoints.restore_data(latest, batches)
    return state, batches, timings, faults, unevaluated


def _counted_faults(
    line: Mapping[str, Any], latest: int | None
) -> dict[str, Any] | None:
    """What a line of metrics tells a run that continues from the step ``latest``."""
    faults = {
        name: number
        for name, number in line.items()
        if number and (name.endswith("/left_out") or name == "all/skipped_steps")
    }
    if faults or line["step"] == latest:
        return {"step": line["step"], **faults}
    return None


def _check_that_it_is_new(folder: RunFolder) -> None:
    """Refuses to begin anew where checkpoints have been, and are not."""
    if (folder.path / FIRST).exists():
        raise RunFolderError(
            f"there is no checkpoint in {folder.path / CHECKPOINTS}, but "
            f"{folder.path / FIRST} says that there was one: put them back, or choose "
            "another --workdir to begin anew"
        )


def _read_unevaluated(folder: RunFolder) -> dict[str, Any] | None:
    """What a part of the run that was stopped knew of the step that it evaluated."""
    document = folder.read_json(UNEVALUATED)
    if document is None:
        return None
    step, metrics, timing = map(document.get, ("step", "metrics", "timing"))
    if (
        type(step) is not int
        or not isinstance(metrics, dict)
        or not isinstance(timing, dict)
        or timing.get("step") != step
    ):
        raise RunFolderError(
            f"{folder.path / UNEVALUATED} is damaged; delete it, and metrics.jsonl "
            "will lack the line of an evaluation"
        )
    return document


class _Loop:
    """The loop proper: step, log, evaluate, save."""

    def __init__(
        self,
        program,
        step,
        evaluate,
        checkpoints,
        folder,
        observers,
        timings,
        faults,
        signals,
        rescue,
    ):
        self._experiment: Experiment = program.experiment
        self._program, self._step, self._evaluate = program, step, evaluate
        self._checkpoints, self._folder = checkpoints, folder
        self._observers: Sequence[Observer] = observers
        self._timings: Timings = timings
        self._fault_log: FaultLog = faults
        self._signals: StopSignals = signals
        self._rescue: Callable[..., RunFolderError] = rescue
        # What this process knows of storage that fails, and what all of them do.
        self._noted: str | None = None
        self._fault: str | None = None
        self._unwritten = Unwritten([], {})
        self.final_scores: dict[str, Any] | None = None

    def run(
        self,
        state: TrainState,
        batches: grain.DatasetIterator,
        unevaluated: Mapping[str, Any] | None,
    ) -> TrainState:
        """Trains to the last step, and waits until all is saved."""
        experiment = self._experiment
        done = int(state.step)
        if unevaluated is not None:
            self._evaluate_and_log(done, state, unevaluated["metrics"], True)
            self._agree()
            if self._signals.interrupted() or self._fault is not None:
                self._finish(done, state, batches)
                return state
            if is_main():
                with self._noting_faults():
                    (self._folder.path / UNEVALUATED).unlink(missing_ok=True)
        unlogged: tuple[int, Metrics] | None = None
        self._timings.start()
        for step in range(done + 1, experiment.num_steps + 1):
            for observer in self._observers:
                observer.begin(step)
            try:
                with self._timings.waiting():
                    rows = next(batches)
            except Exception:
                # One process alone cannot save what others have parts of.
                if step > done + 1 and jax.process_count() == 1:
                    self._end_early(step - 1, state, batches, unlogged)
                raise
            batch = self._program.place(rows)
            state, metrics = self._step(state, batch)
            self._fault_log.follow(step, rows, batch, metrics.pop(REPORT))
            last = step == experiment.num_steps
            evaluate = last or step % experiment.evaluate_every == 0
            save = last or step % experiment.checkpoint_every == 0
            if unlogged is not None:
                # Fetched only now, while this step computes.
                logged, values = unlogged[0], self._fetch(*unlogged)
                self._timings.stop(logged)
                self._log(logged, values)
                self._timings.start()
                unlogged = None
            if evaluate or save:
                jax.block_until_ready(state)
                self._timings.stop(step)
                self._evaluate_and_log(
                    step, state, self._fetch(step, metrics), evaluate
                )
                if save:
                    self._save(step, state, batches)
                self._timings.start()
            elif step % experiment.log_every == 0:
                unlogged = step, metrics
            if evaluate or save or jax.process_count() == 1:
                # Several processes wait for each other here anyway.
                self._agree()
            stopped = self._signals.stops_after(step)
            if (stopped is not None or self._fault is not None) and not last:
                self._end_early(step, state, batches, unlogged)
                assert stopped is not None
                raise StoppedError(stopped)
        self._finish(experiment.num_steps, state, batches)
        return state

    def _end_early(
        self,
        step: int,
        state: TrainState,
        batches: grain.DatasetIterator,
        unlogged: tuple[int, Metrics] | None,
    ) -> None:
        """Logs and saves a step after which the run does not go on."""
        if unlogged is not None:
            self._timings.stop(step)
            self._log(step, self._fetch(*unlogged))
        if step % self._experiment.checkpoint_every:
            self._save(step, state, batches)
        self._finish(step, state, batches)

    def _fetch(self, step: int, metrics: Metrics) -> dict[str, Any]:
        """A step's metrics on the host, with the faults since the line before."""
        values = jax.device_get(metrics)
        self._append([(SPIKES, line) for line in self._fault_log.take(step)])
        return {**values, **self._fault_log.line()}

    def _append(self, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Adds lines to logs, and keeps them should that fail."""
        for name, content in lines:
            self._unwritten.lines.append((name, content))
            with self._noting_faults():
                self._folder.append(name, content)
        if self._noted is None:
            self._unwritten.lines.clear()

    def _enter(self, step: int, phase: str) -> None:
        for observer in self._observers:
            observer.phase(step, phase)

    def _evaluate_and_log(
        self, step: int, state: TrainState, metrics: Mapping, evaluate: bool
    ) -> None:
        try:
            scores = self._scores(step, state) if evaluate else {}
        except CutShortError:
            timing = self._timings.line()
            document = {"step": step, "metrics": to_json(metrics), "timing": timing}
            self._unwritten.documents[UNEVALUATED] = document
            with self._noting_faults():
                self._folder.write_json(UNEVALUATED, document)
        else:
            self._log(step, metrics, scores)

    def _scores(self, step: int, state: TrainState) -> dict[str, float]:
        """Flat test metrics; at the last step of all test records."""
        self._enter(step, "evaluating")
        last = step == self._experiment.num_steps
        number = None if last else self._experiment.evaluation_examples
        scores = self._evaluate(state.variables, number, self._signals.interrupted)
        if last:
            self.final_scores = scores
        return {
            f"{task}/{'test_loss' if name == 'loss' else name}": value
            for task, values in scores.items()
            for name, value in values.items()
            if name != "constant_predictor"
        }

    def _log(
        self, step: int, metrics: Mapping, scores: Mapping[str, float] | None = None
    ) -> None:
        line, timing = to_json(metrics) | dict(scores or {}), self._timings.line()
        self._append([(METRICS, {"step": step, **line}), (TIMINGS, timing)])
        for observer in self._observers:
            observer.update(step, line, timing, evaluated=bool(scores))
        self._fault_log.check()

    def _save(
        self, step: int, state: TrainState, batches: grain.DatasetIterator
    ) -> None:
        self._append([(SPIKES, line) for line in self._fault_log.take(step)])
        self._fault_log.check()
        if is_main() and self._noted is None:
            with self._noting_faults():
                # Where Orbax cannot make a folder, its threads wait for it for minutes.
                self._probe()
        self._enter(step, "saving")
        self._wait_for_saves()
        if self._fault is not None:
            return
        alone = jax.process_count() == 1
        # Several are in the middle of it together: one that fails cannot tell.
        with self._noting_faults() if alone else contextlib.nullcontext():
            self._checkpoints.save(step, state, batches)

    def _wait_for_saves(self) -> None:
        """Waits until what is being saved is, or all processes know that it is not."""
        # One that has a fault does not wait, unless others wait for it.
        if self._noted is None or jax.process_count() > 1:
            with self._noting_faults():
                self._checkpoints.wait()
        self._agree()

    def _agree(self) -> None:
        """Lets all processes know of a fault of one."""
        self._fault = first_told(self._noted)

    def _finish(
        self, step: int, state: TrainState, batches: grain.DatasetIterator
    ) -> None:
        """Waits until all is saved, in the run's folder or elsewhere."""
        self._wait_for_saves()
        if self._fault is not None:
            raise self._rescue(self._fault, self._unwritten, step, state, batches)
        self._checkpoints.close()

    @contextlib.contextmanager
    def _noting_faults(self) -> Iterator[None]:
        """Puts off what becomes of storage that fails until the step is done."""
        try:
            yield
        except (OSError, ValueError) as error:
            fault = storage_fault(error)
            if fault is None:
                # A folder that vanishes confuses Orbax, which then says anything.
                try:
                    self._probe()
                except OSError as cause:
                    fault = storage_fault(cause)
                else:
                    raise
            self._noted = self._noted or fault

    def _probe(self) -> None:
        """Fails where no folder can be made for a checkpoint."""
        probe = self._folder.path / CHECKPOINTS / f".writable_{jax.process_index()}"
        probe.mkdir(exist_ok=True)
        probe.rmdir()
