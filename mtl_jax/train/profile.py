"""A trace of a few steps of a run, for XProf and Perfetto."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from mtl_jax.train.run_folder import refuse_links
from mtl_jax.train.telling import tell


class Profile:
    """Traces some steps with JAX's profiler.

    Before the first of them and after the last, the devices finish all that they were
    given, so that these steps are there from beginning to end, and nothing else is.
    In between nothing waits.

    Args:
      folder: Where to write; each trace gets a folder of its own in it.
      start: First step to trace; the first of a run is 1.
      stop: First step not to trace.

    Raises:
      RunFolderError: If the folder is a symbolic link or holds one.
    """

    def __init__(self, folder: Path, start: int, stop: int):
        refuse_links(folder)
        self._folder, self._start, self._stop = folder, start, stop
        self._tracing = False
        self._annotation = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._annotation.close()
        self._end()

    def phase(self, step: int, name: str) -> None:
        """Ends the trace if all of its steps are done."""
        self._annotation.close()
        if step + 1 >= self._stop:
            self._end()

    def begin(self, step: int) -> None:
        """Begins or ends the trace where it is time to, and marks the step in it."""
        self._annotation.close()
        if step == self._start:
            _finish_what_is_running()
            options = jax.profiler.ProfileOptions()
            # Every call of a Python function would bury the rest.
            options.python_tracer_level = 0
            try:
                jax.profiler.start_trace(self._folder, profiler_options=options)
            except (OSError, RuntimeError) as error:
                self._report_no_trace(error)
            else:
                self._tracing = True
        elif step >= self._stop:
            self._end()
        if self._tracing:
            self._annotation.enter_context(
                jax.profiler.StepTraceAnnotation("train", step_num=step)
            )

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        timing: Mapping[str, float],
        evaluated: bool,
    ) -> None:
        """Metrics are not in the trace."""

    def _end(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        try:
            _finish_what_is_running()
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self._report_no_trace(error)
        else:
            last = self._stop - 1
            tell(f"trace of steps {self._start} to {last}: {self._folder}")

    def _report_no_trace(self, error: Exception) -> None:
        tell(f"no trace in {self._folder}: {error}; the run goes on")


def _finish_what_is_running() -> None:
    """Waits until the devices have computed all arrays that there are."""
    jax.block_until_ready(jax.live_arrays())
