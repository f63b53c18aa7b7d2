"""A run at one moment, drawn for a terminal."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtl_jax.report.live import RunView
from mtl_jax.report.quantities import duration_text, rate_text, share_text
from mtl_jax.report.results import format_value

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
MAX_SPARK = 24
MAX_TEXT = 160
STYLES = {
    "waiting": "cyan",
    "working": "green",
    "quiet": "yellow",
    "lost": "bold red",
    "done": "blue",
}


class Frame:
    """All runs below one another, as wide as there is space.

    Args:
      views: The runs.
      height: Lines that there are; so that all runs are seen, tasks may be left out.
        None for any number.
    """

    def __init__(self, views: Sequence[RunView], height: int | None = None):
        self._views, self._height = views, height

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Draws the runs."""
        tasks = None
        if self._height is not None:
            # A panel has a frame of two lines, and six that are not of a task.
            tasks = max(1, self._height // len(self._views) - 8)
        for view in self._views:
            yield _panel(view, options.max_width, tasks, options.ascii_only)


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """A line of bars as high as the values, means where there are more than fit.

    Args:
      values: In order; those that are not finite leave a gap.
      width: The most characters.
      bars: The characters from the lowest to the highest.
    """
    number = min(width, len(values))
    if not number:
        return ""
    parts = np.array_split(np.asarray(values, np.float64), number)
    finite = [part[np.isfinite(part)] for part in parts]
    means = [float(part.mean()) if part.size else math.nan for part in finite]
    known = [mean for mean in means if not math.isnan(mean)]
    if not known:
        return ""
    low, high = min(known), max(known)
    steps = len(bars) - 1

    def bar(mean: float) -> str:
        if math.isnan(mean):
            return " "
        height = (mean - low) / (high - low) if high > low else 0.5
        return bars[round(height * steps)]

    return "".join(map(bar, means))


def clean(text: str) -> Text:
    """Text from a file as it may be shown in a terminal.

    What would steer the terminal is replaced, nothing of it is markup, and what is
    longer than a line is cut.
    """
    cut = text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
    return Text("".join(c if c.isprintable() else "�" for c in cut))


def _panel(view: RunView, width: int, tasks: int | None, ascii_only: bool) -> Panel:
    style = STYLES[view.mood]
    title = Text.assemble(clean(str(view.path)), style="bold")
    if view.config and view.config != view.path.name:
        title.append(" · " if not ascii_only else " - ").append_text(clean(view.config))
    inner = width - 4
    parts: list[RenderableType] = [
        Text.assemble(("* " if ascii_only else "● "), clean(view.status), style=style)
    ]
    if view.step is not None:
        parts.append(_progress(view))
    if speed := _speed(view):
        parts.append(Text(speed, "dim"))
    if view.tasks:
        parts.append(_tasks(view, inner, tasks, ascii_only))
    for problem in view.problems:
        parts.append(Text.assemble("! ", clean(problem), style="yellow"))
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        border_style=style,
        padding=(0, 1),
    )


def _progress(view: RunView) -> Table:
    step, total = view.step or 0, view.num_steps
    grid = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, 1, None):
        grid.add_column(no_wrap=True, ratio=ratio)
    if total is None:
        grid.add_row(f"step {step:,}", "", "")
        return grid
    left = view.seconds_left
    ends = view.mood in ("working", "quiet") and left is not None
    grid.add_row(
        f"step {step:,} / {total:,}",
        ProgressBar(
            total=max(total, 1),
            completed=min(step, total),
            complete_style=STYLES[view.mood],
            finished_style=STYLES[view.mood],
        ),
        f"{step / max(total, 1):.0%}"
        + (f", {duration_text(left)} left" if ends else ""),
    )
    return grid


def _speed(view: RunView) -> str:
    parts = []
    if view.examples_per_second is not None:
        parts.append(f"{rate_text(view.examples_per_second)} examples/s")
    if view.seconds_per_step is not None:
        parts.append(f"{duration_text(view.seconds_per_step)} a step")
    if view.input_stall is not None:
        parts.append(f"{share_text(view.input_stall)} waiting for data")
    if view.evaluated_at is not None:
        parts.append(f"evaluated at {view.evaluated_at:,}")
    if view.saved_at is not None:
        parts.append(f"saved at {view.saved_at:,}")
    return ", ".join(parts)


def _tasks(view: RunView, width: int, most: int | None, ascii_only: bool) -> Table:
    """A row a task, and one for all of them together."""
    bars = ASCII_BARS if ascii_only else BARS
    experts = any(task.dead_experts is not None for task in view.tasks)
    faults = bool(view.skipped_steps) or any(task.left_out for task in view.tasks)
    # Of what names and numbers leave, each of two sparklines gets a half.
    spark = max(0, min(MAX_SPARK, (width - 50 - 10 * experts - 8 * faults) // 2))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=22)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("test metric", no_wrap=True, overflow="ellipsis", max_width=16)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)

    def row(
        name: Text,
        losses: Sequence[float],
        metric: Text,
        scores: Sequence[float],
        more: Sequence[str],
        score_text: Callable[[float], str] = format_value,
        style: str = "",
    ) -> None:
        score = scores[-1] if scores and math.isfinite(scores[-1]) else None
        table.add_row(
            name,
            format_value(losses[-1] if losses else None),
            Text(sparkline(_logarithms(losses), spark, bars), "cyan"),
            metric,
            format_value(None) if score is None else score_text(score),
            Text(sparkline(scores, spark, bars), "green"),
            *more,
            style=style,
        )

    if experts:
        table.add_column("dead", justify="right", no_wrap=True)
    if faults:
        table.add_column("faults", justify="right", no_wrap=True)
    for task in view.tasks[:most]:
        row(
            clean(task.name),
            task.losses,
            clean(task.metric),
            task.scores,
            _counts(task.dead_experts, task.left_out, experts, faults),
        )
    hidden = len(view.tasks[most:]) if most is not None else 0
    if hidden:
        table.add_row(Text(f"{hidden} more", "dim"))
    row(
        Text("all"),
        view.losses,
        Text("conflict rate"),
        view.conflict_rates,
        _counts(None, view.skipped_steps, experts, faults),
        share_text,
        "bold",
    )
    return table


def _logarithms(values: Sequence[float]) -> list[float]:
    """So that the first steps do not flatten all others; NaN where there is none."""
    return [math.log(value) if value > 0 else math.nan for value in values]


def _counts(
    dead: float | None, faults: float, has_experts: bool, has_faults: bool
) -> list[str]:
    cells = []
    if has_experts:
        cells.append("" if dead is None else share_text(dead))
    if has_faults:
        cells.append(f"{faults:,.0f}" if faults else "")
    return cells
