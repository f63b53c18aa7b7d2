"""Figures of quantities over training steps, one small panel each."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mtl_jax.report.images import Image, figure_image
from mtl_jax.report.results import Values, format_value, result_rows
from mtl_jax.report.run_folder import Run

# Okabe and Ito's palette, told apart with any common colour blindness.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A6A00",
)
MARKERS = "os^Dv<>"
DASHES = ("-", "--", "-.", ":")
LEVEL_DASHES = {"constant predictor": "--", "baseline": ":"}
MAX_LINES_OVER_LEGEND = 4
INK = "#333333"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    # Names come from configurations and data: a dollar sign is a dollar sign.
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
PANEL_INCHES = (4.0, 2.7)
MAX_POINTS = 200


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
      label: Its name in the legend; empty for none.
      steps: int64 ``[points]``.
      values: float64 ``[points]``.
      marked: Draw every point (few of them) rather than the line alone.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    marked: bool = False


def binned(
    steps: np.ndarray, values: np.ndarray, max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Means over equally many consecutive points, so that long runs stay legible.

    Args:
      steps: int64 ``[points]``.
      values: float64 ``[points, ...]``; NaN counts as absent.
      max_points: The most points to return.

    Returns:
      The last step of each bin, and its mean (NaN where all are absent).
    """
    if len(steps) <= max_points:
        return steps, values
    edges = np.linspace(0, len(steps), max_points + 1).astype(int)
    counts = np.add.reduceat(~np.isnan(values), edges[:-1], axis=0)
    sums = np.add.reduceat(np.nan_to_num(values), edges[:-1], axis=0)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return steps[edges[1:] - 1], means


def shortened(name: str, max_length: int = 22) -> str:
    """A name that leaves room for the figure it labels."""
    if len(name) <= max_length:
        return name
    # Names of one family differ at their ends more often than in between.
    tail = (max_length - 1) // 2
    return f"{name[: max_length - 1 - tail]}…{name[-tail:]}"


def loss_panels(run: Run) -> list[Image]:
    """Training and test loss of each task over the steps, on a logarithmic axis."""
    panels = []
    for task in run.tasks:
        train = Line("training", *run.series(f"{task}/loss"))
        test = Line("test", *run.series(f"{task}/test_loss"), marked=True)
        lines = [line for line in (train, test) if np.isfinite(line.values).any()]
        if lines:
            panels.append(line_panel(task, lines, alt=f"Loss of {task}", log=True))
    return panels


def metric_panels(run: Run, baselines: Values | None = None) -> list[Image]:
    """Each test metric over the steps, beside its constant predictor and baseline."""
    panels = []
    for row in result_rows(run.result):
        line = Line("", *run.series(f"{row.task}/{row.metric}"), marked=True)
        if not np.isfinite(line.values).any():
            continue
        known = {
            "constant predictor": row.constant_predictor,
            "baseline": (baselines or {}).get(row.key),
        }
        panels.append(
            line_panel(
                f"{row.task}: {row.metric}",
                [line],
                alt=f"Test {row.metric} of {row.task}",
                levels={name: v for name, v in known.items() if v is not None},
            )
        )
    return panels


def gradient_norm_panels(run: Run) -> list[Image]:
    """The norm of each task's gradient over the steps, on a logarithmic axis."""
    lines = [Line(task, *run.series(f"{task}/gradient_norm")) for task in run.tasks]
    lines = [line for line in lines if (line.values > 0).any()]
    if not lines:
        return []
    title = "gradient norm by task"
    return [line_panel(title, lines, alt="Norm of each task's gradient", log=True)]


def line_panel(
    title: str,
    lines: Sequence[Line],
    *,
    alt: str,
    levels: Mapping[str, float] | None = None,
    log: bool = False,
) -> Image:
    """One small panel of lines over training steps.

    Args:
      title: The panel's title.
      lines: What to draw, at least one line.
      alt: The beginning of the text alternative; the first and last values are added.
      levels: Horizontal reference lines by name, a key of ``LEVEL_DASHES``.
      log: Use a logarithmic vertical axis.

    Returns:
      The rendered panel.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=PANEL_INCHES, layout="constrained")
        axes = figure.add_subplot(title=shortened(title, 44), xlabel="step")
        for index, line in enumerate(lines):
            _draw_line(axes, line, index)
        for name, level in (levels or {}).items():
            dashes = LEVEL_DASHES[name]
            axes.axhline(level, color=INK, linestyle=dashes, linewidth=1.2, label=name)
        if log:
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.yaxis.set_minor_formatter(FuncFormatter(_plain_if_narrow(axes)))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(lines) > MAX_LINES_OVER_LEGEND:
            columns = 3 if max(len(line.label) for line in lines) <= 12 else 2
            rows = math.ceil(len(lines) / columns)
            figure.set_figheight(PANEL_INCHES[1] + 0.2 * rows)
            figure.legend(loc="outside lower center", ncols=columns)
        elif axes.get_legend_handles_labels()[1]:
            axes.legend()
        return figure_image(figure, f"{alt} over training steps: {_spoken(lines)}")


def _draw_line(axes: Axes, line: Line, index: int) -> None:
    """Draws one line, with the raw values faint behind its means if there are many."""
    color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
    steps, values = binned(line.steps, line.values)
    if len(steps) < len(line.steps):
        axes.plot(line.steps, line.values, color=color, alpha=0.18, linewidth=0.7)
    axes.plot(
        steps,
        values,
        color=color,
        linestyle=DASHES[index // len(PALETTE) % len(DASHES)],
        linewidth=1.6,
        marker=marker if line.marked or len(steps) == 1 else None,
        markersize=3.5,
        label=shortened(line.label) or None,
    )


def _spoken(lines: Sequence[Line]) -> str:
    """First and last finite value of each line, in words."""
    parts = []
    for line in lines:
        finite = line.values[np.isfinite(line.values)]
        if finite.size:
            first, last = format_value(finite[0]), format_value(finite[-1])
            parts.append(f"{line.label or 'value'} from {first} to {last}")
    return "; ".join(parts) + "."


def _plain_number(value: float, _position: int = 0) -> str:
    """A tick label without powers of ten where that is short."""
    return f"{value:g}" if 1e-4 <= abs(value) < 1e5 else f"{value:.0e}"


def _plain_if_narrow(axes: Axes) -> Callable[[float, int], str]:
    """Labels a few minor ticks of an axis that spans less than two decades."""

    def label(value: float, position: int = 0) -> str:
        low, high = axes.get_ylim()
        leading = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
        labelled = (2, 3, 5) if high / low < 10 else (3,)
        narrow = high / low < 100 and leading in labelled
        return _plain_number(value, position) if narrow else ""

    return label
