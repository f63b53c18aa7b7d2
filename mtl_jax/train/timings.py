"""How long training takes, over all the parts of a run that was interrupted."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtl_jax.train.run_folder import RunFolderError

FIELDS = ("seconds_per_step", "examples_per_second", "input_stall", "wall_time_seconds")


class Timings:
    """A stopwatch that makes the lines of ``timings.jsonl``.

    Each line is about the training steps since the line before. Evaluation and saving
    count only in its ``wall_time_seconds``, the time from the start of the run.

    Args:
      lines: Lines that earlier parts of the run left.
      batch_size: Examples in a step.
      started: When this part started, by ``time.monotonic``.

    Raises:
      RunFolderError: If the lines are not such as this class makes.
    """

    def __init__(
        self, lines: Sequence[Mapping[str, Any]], batch_size: int, started: float
    ):
        for line in lines:
            values = [line.get(name) for name in FIELDS]
            if not all(isinstance(value, int | float) for value in values):
                raise RunFolderError(
                    f"the line of step {line['step']} in timings.jsonl is damaged; "
                    "delete the file"
                )
        self._lines = [dict(line) for line in lines]
        self._batch_size = batch_size
        # When the run would have started, had it not been interrupted.
        self._started = started - (lines[-1]["wall_time_seconds"] if lines else 0.0)
        self._waited, self._clock = 0.0, started

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
        steps = step - (self._lines[-1]["step"] if self._lines else 0)
        self._lines.append(
            {
                "step": step,
                "seconds_per_step": seconds / steps,
                "examples_per_second": steps * self._batch_size / seconds,
                "input_stall": self._waited / seconds,
            }
        )

    def line(self) -> dict[str, float]:
        """The line of the stretch that ended last, with the wall time of now."""
        return self._lines[-1] | {"wall_time_seconds": self.wall_time_seconds}

    def average(self) -> dict[str, float | None]:
        """Examples per second and input stall of the run, its first line left out."""
        stretches = [
            (after["step"] - before["step"], after)
            for before, after in itertools.pairwise([{"step": 0}, *self._lines])
        ]
        stretches = stretches[1:] or stretches
        steps = sum(count for count, _ in stretches)
        seconds = sum(count * line["seconds_per_step"] for count, line in stretches)
        waited = sum(
            count * line["seconds_per_step"] * line["input_stall"]
            for count, line in stretches
        )
        if not seconds:
            return {"examples_per_second": None, "input_stall": None}
        return {
            "examples_per_second": steps * self._batch_size / seconds,
            "input_stall": waited / seconds,
        }
