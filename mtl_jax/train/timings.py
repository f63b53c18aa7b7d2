"""How long training takes, over all the parts of a run that was interrupted."""

import contextlib
import operator
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mtl_jax.train.run_folder import RunFolderError

FIELDS = ("seconds_per_step", "examples_per_second", "input_stall", "wall_time_seconds")


class Timings:
    """A stopwatch that makes the lines of ``timings.jsonl``.

    Each line is about the training steps since the line before. Evaluation and saving
    count only in its ``wall_time_seconds``, the time from the start of the run.

    Args:
      batch_size: Examples in a step.
      started: When this part started, by ``time.monotonic``.
    """

    def __init__(self, batch_size: int, started: float):
        self._batch_size, self._this_part = batch_size, started
        # When the run would have started, had it not been interrupted.
        self._started = started
        self._waited, self._clock = 0.0, started
        self._latest: dict[str, Any] = {"step": 0}
        # Steps, seconds and seconds of waiting: of the first line, and of all others.
        self._first: tuple[float, ...] | None = None
        self._others: tuple[float, ...] = (0.0, 0.0, 0.0)

    def resume(self, line: Mapping[str, Any]) -> None:
        """Takes up a line that an earlier part of the run left; in their order.

        Raises:
          RunFolderError: If it is not such as this class makes.
        """
        values = [line.get(name) for name in FIELDS]
        if not all(isinstance(value, int | float) for value in values):
            raise RunFolderError(
                f"the line of step {line['step']} in timings.jsonl is damaged; "
                "delete the file"
            )
        self._started = self._this_part - line["wall_time_seconds"]
        self._add({name: line[name] for name in ("step", *FIELDS)})

    def _add(self, line: dict[str, Any]) -> None:
        steps = line["step"] - self._latest["step"]
        seconds = steps * line["seconds_per_step"]
        stretch = (steps, seconds, seconds * line["input_stall"])
        if self._first is None:
            self._first = stretch
        else:
            self._others = tuple(map(operator.add, self._others, stretch))
        self._latest = line

    @property
    def wall_time_seconds(self) -> float:
        """Time from the start of the run to now."""
        return time.monotonic() - self._started

    def start(self) -> None:
        """Starts, or starts again after what is not training."""
        self._waited, self._clock = 0.0, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what is done inside as waiting for data."""
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    def stop(self, step: int) -> None:
        """Ends the stretch of training whose last step is ``step``."""
        seconds = max(time.monotonic() - self._clock, 1e-9)
        steps = step - self._latest["step"]
        self._add(
            {
                "step": step,
                "seconds_per_step": seconds / steps,
                "examples_per_second": steps * self._batch_size / seconds,
                "input_stall": self._waited / seconds,
            }
        )

    def line(self) -> dict[str, float]:
        """The line of the stretch that ended last, with the wall time of now."""
        return self._latest | {"wall_time_seconds": self.wall_time_seconds}

    def average(self) -> dict[str, float | None]:
        """Examples per second and input stall of the run, its first line left out."""
        total = self._others if self._others[0] else self._first
        steps, seconds, waited = total or self._others
        if not seconds:
            return {"examples_per_second": None, "input_stall": None}
        return {
            "examples_per_second": steps * self._batch_size / seconds,
            "input_stall": waited / seconds,
        }
