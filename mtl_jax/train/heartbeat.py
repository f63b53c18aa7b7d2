"""A sign of life of a run, for whoever looks at its folder."""

import os
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from mtl_jax.train.run_folder import RunFolder
from mtl_jax.train.telling import tell

HEARTBEAT = "heartbeat.json"
INTERVAL_SECONDS = 5.0
MAX_ERROR_LENGTH = 300

# However slow the file system is, it takes the run no more than this share of its time.
MAX_SHARE_OF_TIME = 0.005


class Heartbeat:
    """Writes ``heartbeat.json`` while a run goes on: who, where, when, what.

    During training it is written every few seconds, and whenever the run goes on to
    something else. A write that fails is reported once, and the run goes on.

    Args:
      folder: The run's folder.
      num_steps: Length of the run.
      headlines: Task name -> name of its first metric.
      stops: Exceptions by which a run is stopped on purpose, and has not failed.
      interval: Least time between two writes while training, in seconds.
    """

    def __init__(
        self,
        folder: RunFolder,
        num_steps: int,
        headlines: Mapping[str, str],
        stops: tuple[type[BaseException], ...] = (KeyboardInterrupt,),
        *,
        interval: float = INTERVAL_SECONDS,
    ):
        self._folder, self._stops, self._interval = folder, stops, interval
        self._known = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "num_steps": num_steps,
            "headlines": dict(headlines),
        }
        self._step: int | None = None
        self._state, self._since = "", 0.0
        self._next = time.monotonic()
        self._reported = False

    def __enter__(self) -> Self:
        self._turn_to("starting")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._turn_to("finished")
        elif issubclass(kind, self._stops):
            self._turn_to("stopped")
        else:
            message = f"{kind.__name__}: {error}"[:MAX_ERROR_LENGTH]
            self._turn_to("failed", error=message)

    def phase(self, step: int, name: str) -> None:
        """Writes what the run does now."""
        self._step = step
        self._turn_to(name)

    def begin(self, step: int) -> None:
        """Writes that the run trains, if it is time to."""
        self._step = step - 1
        if self._state != "training":
            self._turn_to("training")
        elif time.monotonic() >= self._next:
            self._write()

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        timing: Mapping[str, float],
        evaluated: bool,
    ) -> None:
        """Nothing of a step's metrics is a sign of life."""

    def _turn_to(self, state: str, **more: str) -> None:
        self._state, self._since = state, time.time()
        self._write(**more)

    def _write(self, **more: str) -> None:
        beat = {
            "step": self._step,
            "state": self._state,
            "since": self._since,
            "time": time.time(),
        }
        started = time.monotonic()
        try:
            self._folder.write_json(
                HEARTBEAT, {**self._known, **beat, **more}, durable=False
            )
        except OSError as error:
            self._report(error)
        ended = time.monotonic()
        self._next = ended + max(self._interval, (ended - started) / MAX_SHARE_OF_TIME)

    def _report(self, error: OSError) -> None:
        if not self._reported:
            tell(
                f"cannot write {self._folder.path / HEARTBEAT}: {error.strerror}; "
                "the run goes on"
            )
        self._reported = True
