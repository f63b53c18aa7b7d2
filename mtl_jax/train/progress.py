"""The live view of a run in the terminal."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class ProgressDisplay:
    """Shows step, time left, speed, and each task's loss and headline metric.

    In a terminal the display is redrawn in place; elsewhere a line is printed at every
    evaluation.

    Args:
      headlines: Task name -> name of its first metric.
      num_steps: Length of the run.
      first_step: Step that the run starts or continues at.
      console: Where to draw.
    """

    def __init__(
        self,
        headlines: Mapping[str, str],
        num_steps: int,
        first_step: int = 0,
        console: Console | None = None,
    ):
        self._headlines = headlines
        self._console = console or Console()
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(
            "train", total=num_steps, completed=first_step, speed=""
        )
        self._values: dict[str, Any] = {}
        self._speed, self._paused = "", False
        self._started = time.monotonic()
        self._live = (
            Live(self._render(), console=self._console, refresh_per_second=4)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> "ProgressDisplay":
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.update(self._render())
            self._live.__exit__(*exception)

    def phase(self, step: int, name: str) -> None:
        """Says what the run does instead of training."""
        self._paused = True
        self._bar.update(self._task, completed=step, speed=f"{name} ...")

    def begin(self, step: int) -> None:
        """Shows the speed again after something else than a step."""
        if self._paused:
            self._paused = False
            self._bar.update(self._task, speed=self._speed)

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        timing: Mapping[str, float],
        evaluated: bool,
    ) -> None:
        """Shows the metrics and timing of a step.

        Args:
          step: Updates done.
          metrics: The step's line of metrics.
          timing: The step's line of timings.
          evaluated: Whether the metrics hold those of an evaluation.
        """
        self._values.update(metrics)
        self._speed = (
            f"{timing['examples_per_second']:.0f} examples/s, "
            f"{timing['input_stall']:.1%} waiting for data"
        )
        self._bar.update(self._task, completed=step, speed=self._speed)
        if self._live:
            self._live.update(self._render())
        elif evaluated:
            scores = ", ".join(
                f"{task} {_number(self._values.get(f'{task}/{metric}'), 3)}"
                for task, metric in self._headlines.items()
            )
            seconds = time.monotonic() - self._started
            self._console.print(
                f"step {step}, {seconds:.0f} s, {self._speed}: loss "
                f"{_number(metrics['all/loss'], 3)}; {scores}",
                soft_wrap=True,
                highlight=False,
            )

    def _render(self) -> Group:
        table = Table("task", "loss", "test metric", "", box=None, pad_edge=False)
        for task, metric in self._headlines.items():
            table.add_row(
                task,
                _number(self._values.get(f"{task}/loss")),
                _number(self._values.get(f"{task}/{metric}")),
                metric,
            )
        return Group(self._bar, table)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
