"""Where the first NaN of a step comes from: the operation, and its line of source."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.experimental import checkify

from mtl_jax.train.fault_log import NumericalFaultError
from mtl_jax.train.state import TrainState
from mtl_jax.train.step import Metrics, Step

LIBRARIES = ("jax", "jaxlib", "flax", "optax")

Checked = Callable[..., tuple[checkify.Error, tuple[TrainState, Metrics]]]


def checking(step: Step) -> Checked:
    """A step that also returns an error, which tells of the first NaN it computes.

    Arrays that are NaN to begin with, such as targets without a label, are none. The
    program looks at every result of an operation that can make one; it takes longer to
    compile and to run.
    """
    return checkify.checkify(step, errors=checkify.nan_checks)


def raising(checked: Checked) -> Callable[..., tuple[TrainState, Metrics]]:
    """A step that waits for its own end, and fails where it has computed a NaN.

    Args:
      checked: What `checking` made, compiled.

    Returns:
      The step. It raises a `NumericalFaultError`.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        error, (state, metrics) = checked(state, batch)
        found: Any = error.get_exception()
        if found is not None:
            raise NumericalFaultError(
                f"step {int(state.step)}: the first NaN is made by the primitive "
                f"{found.prim} at {_origin(found.traceback_info)}"
            )
        return state, metrics

    return step


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
