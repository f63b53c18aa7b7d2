"""Rows of final metrics, and their comparison with baselines."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.report.delta_m import (
    delta_m_metrics,
    delta_m_tasks,
)
from mtl_jax.report.run_folder import Run

Values = Mapping[tuple[str, str], float]
"""Metric values by (task, metric)."""

ABSENT = "–"


@dataclasses.dataclass(frozen=True)
class Row:
    """One metric of one task on held-out data.

    Attributes:
      task: Task name.
      metric: Metric name.
      value: The trained model's value, or None where it could not be computed.
      higher_is_better: The metric's direction.
      constant_predictor: What the best constant prediction scores, if known.
      headline: Whether this metric stands for its task.
    """

    task: str
    metric: str
    value: float | None
    higher_is_better: bool
    constant_predictor: float | None
    headline: bool

    @property
    def key(self) -> tuple[str, str]:
        """The row's place in :data:`Values`."""
        return self.task, self.metric


@dataclasses.dataclass(frozen=True)
class Baselines:
    """What a model is compared with.

    Attributes:
      values: Baseline metrics; the mean where a task has several single-task runs.
      description: One sentence on which runs these are.
    """

    values: Values
    description: str


@dataclasses.dataclass(frozen=True)
class DeltaM:
    """Delta-m of one run in both conventions, in per cent.

    Attributes:
      over_metrics: Mean over metrics, lower is better; None where undefined.
      over_tasks: Mean over tasks, higher is better; None where undefined.
      left_out: Why metrics were left out; empty if none were.
    """

    over_metrics: float | None
    over_tasks: float | None
    left_out: str


def result_rows(result: Mapping[str, Any]) -> list[Row]:
    """The metrics of a result, a row each, in the order of its tasks.

    Args:
      result: The contents of a run's ``result.json``.

    Returns:
      One row per task and metric.
    """
    return [
        Row(
            task=task,
            metric=metric,
            value=_finite(entry["value"]),
            higher_is_better=bool(entry["higher_is_better"]),
            constant_predictor=_finite(entry.get("constant_predictor")),
            headline=metric == task_entry["headline"],
        )
        for task, task_entry in result["tasks"].items()
        for metric, entry in task_entry["metrics"].items()
    ]


def results_table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The final metrics as rows of text for a terminal; see :func:`format_table`.

    Args:
      result: The contents of a run's ``result.json``.

    Returns:
      A header row, then one row per task and metric: task, metric with the arrow of
      its better direction, value, value of the best constant prediction.
    """
    header = ("task", "metric", "value", "constant predictor")
    return [
        header,
        *(
            (
                row.task,
                f"{row.metric} {direction(row.higher_is_better)}",
                format_value(row.value),
                format_value(row.constant_predictor),
            )
            for row in result_rows(result)
        ),
    ]


def format_table(rows: Sequence[Sequence[str]], left_columns: int = 2) -> str:
    """Aligned plain text with a rule under the first row.

    Args:
      rows: The header, then the body; all rows of one length.
      left_columns: How many columns are names, aligned to the left; the others are
        numbers, aligned to the right.

    Returns:
      Lines without trailing blanks or a trailing newline.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if index < left_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def direction(higher_is_better: bool) -> str:
    """The arrow that shows where better values lie."""
    return "↑" if higher_is_better else "↓"


def format_value(value: float | None) -> str:
    """A metric's value with four decimals, or five digits where it is large."""
    if value is None or not math.isfinite(value):
        return ABSENT
    text = f"{value:.4f}" if abs(value) < 10 else f"{value:,.5g}"
    return text.replace("-", "−")


def single_task_baselines(runs: Sequence[Run]) -> Baselines | None:
    """The metrics of the single-task runs among ``runs``, by task.

    Args:
      runs: Any runs; those with exactly one task are the baselines of that task.

    Returns:
      Their metrics, averaged where several runs share a task, or None if there is no
      single-task run.
    """
    single = [run for run in runs if len(run.tasks) == 1]
    if not single:
        return None
    collected: dict[tuple[str, str], list[float]] = {}
    for run in single:
        for row in result_rows(run.result):
            if row.value is not None:
                collected.setdefault(row.key, []).append(row.value)
    values = {key: math.fsum(found) / len(found) for key, found in collected.items()}
    names = ", ".join(run.name for run in single)
    several = len(single) > len({run.tasks for run in single})
    average = ", averaged where a task has several" if several else ""
    return Baselines(values, f"the single-task runs {names}{average}")


def choose_baselines(runs: Sequence[Run]) -> Baselines:
    """The baselines among runs that are compared with each other.

    Args:
      runs: At least one run.

    Returns:
      The single-task runs' metrics, or without such runs the first run's.
    """
    return single_task_baselines(runs) or Baselines(
        {
            row.key: row.value
            for row in result_rows(runs[0].result)
            if row.value is not None
        },
        f"the first run, {runs[0].name}, for want of single-task runs",
    )


def delta_m(rows: Sequence[Row], baselines: Values) -> DeltaM:
    """Delta-m in both conventions over the metrics that both sides have.

    Metrics without a value, or without a positive baseline to be relative to, are left
    out and named.

    Args:
      rows: A run's metrics.
      baselines: The baselines' metrics.

    Returns:
      Both numbers, or None twice if no metric is left.
    """
    usable = [
        row for row in rows if row.value is not None and baselines.get(row.key, 0) > 0
    ]
    used = {row.task for row in usable}
    left_out = dict.fromkeys(
        f"{row.task}/{row.metric}" if row.task in used else row.task
        for row in rows
        if row not in usable
    )
    reason = (
        f"without {', '.join(left_out)} (no value, or no positive baseline)"
        if left_out
        else ""
    )
    if not usable:
        return DeltaM(None, None, reason)
    values = [row.value for row in usable if row.value is not None]
    references = [baselines[row.key] for row in usable]
    higher_is_better = [row.higher_is_better for row in usable]
    return DeltaM(
        delta_m_metrics(values, references, higher_is_better),
        delta_m_tasks(
            values, references, higher_is_better, [row.task for row in usable]
        ),
        reason,
    )


def format_percent(value: float | None) -> str:
    """A signed percentage with two decimals."""
    if value is None:
        return ABSENT
    return f"{value:+.2f} %".replace("-", "−")


def _finite(value: float | None) -> float | None:
    """``value`` as a float, or None where it is absent or not finite."""
    return None if value is None or not math.isfinite(value) else float(value)
