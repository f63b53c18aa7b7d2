"""Where the first NaN of a step comes from: the operation, and its line of source."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import checkify

from mtl_jax.train.fault_log import NumericalFaultError
from mtl_jax.train.faults import REPORT, FaultReport
from mtl_jax.train.state import TrainState
from mtl_jax.train.step import Metrics, Step

LIBRARIES = ("jax", "jaxlib", "flax", "optax")


def explaining(
    compiled: Step,
    step: Step,
    task_names: Sequence[str],
    scope: Callable[[], contextlib.AbstractContextManager],
) -> Step:
    """A step that waits for its own end and, where it is faulty, says what made a NaN.

    Only then is the step computed again, one operation after another, with a look at
    every result of those that can make one. Arrays that are NaN to begin with,
    such as targets without a label, are no fault, and neither is a NaN that comes to
    nothing.

    Args:
      compiled: The step, which does not take the state that it is given.
      step: The same, not compiled.
      task_names: Names of the tasks in order.
      scope: Context in which the step is traced.

    Returns:
      The step. It raises a `NumericalFaultError` where any task is at fault, the step
      is skipped, or the parameters are not finite.
    """

    def explained(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        after, metrics = compiled(state, batch)
        report = FaultReport(*np.asarray(metrics[REPORT]))
        if report.in_a_row[0] or not report.finite[0]:
            number = int(after.step)
            print(f"step {number} is faulty: looking for the operation ...", flush=True)
            with scope():
                found = _first_nan(step, state, batch)
            what = "no operation makes a NaN, but numbers are infinite"
            if found is not None:
                where = _origin(found.traceback_info)
                what = f"the first NaN is made by the primitive {found.prim} at {where}"
            tasks = [n for n, f in zip(task_names, report.faulty, strict=True) if f]
            of = f" of {', '.join(map(repr, tasks))}" if tasks else ""
            raise NumericalFaultError(
                f"numbers{of} are not finite at step {number}: {what}"
            )
        return after, metrics

    return explained


def _first_nan(step: Step, state: TrainState, batch: Any) -> Any:
    """What Checkify tells of the first NaN that a step makes; None if it makes none."""
    # One operation after another: XLA takes too long to compile the checks together,
    # each of which depends on the one before.
    error, _ = checkify.checkify(step, errors=checkify.nan_checks)(state, batch)
    return error.get_exception()


def _origin(traceback: Any) -> str:
    """The innermost line of a traceback of JAX's that is in none of the libraries."""
    folders = [str(Path(path).resolve()) for name in LIBRARIES for path in _paths(name)]
    for frame in traceback.frames:
        file = str(Path(frame.file_name).resolve())
        if not any(file.startswith(f"{folder}/") for folder in folders):
            return f"{file}:{frame.line_num} ({frame.function_name})"
    return "an unknown line"


def _paths(name: str) -> list[str]:
    return list(getattr(sys.modules.get(name), "__path__", []))
