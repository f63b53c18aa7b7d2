"""Several runs side by side: a table for the terminal and a page."""

from collections.abc import Sequence
from pathlib import Path

from mtl_jax.report.curves import Line, line_panel
from mtl_jax.report.delta_m import OVER_METRICS, OVER_TASKS
from mtl_jax.report.images import Image
from mtl_jax.report.page import render, write_atomically
from mtl_jax.report.results import (
    Baselines,
    DeltaM,
    Row,
    choose_baselines,
    delta_m,
    direction,
    format_percent,
    format_table,
    format_value,
    result_rows,
)
from mtl_jax.report.run_folder import Run, read_run


def comparison_table(run_dirs: Sequence[Path]) -> str:
    """The runs' final metrics and delta-m as plain text.

    Among the runs, those with exactly one task are the baselines of their tasks;
    without any, the first run is the baseline.

    Args:
      run_dirs: Folders of at least two finished runs.

    Returns:
      Aligned lines: a row per metric, a column per run, delta-m in both conventions
      below, and a sentence that names the baselines.

    Raises:
      ValueError: If there are fewer than two runs, or a folder holds no finished run.
    """
    runs = _read_runs(run_dirs)
    baselines = choose_baselines(runs)
    names = run_labels(runs)
    body = [
        (f"{task}/{metric} {direction(higher)}", *map(format_value, values))
        for (task, metric), higher, values in _metric_rows(runs)
    ]
    found = [_run_delta_m(run, runs, baselines) for run in runs]
    body += [
        (OVER_METRICS, *(format_percent(entry.over_metrics) for entry in found)),
        (OVER_TASKS, *(format_percent(entry.over_tasks) for entry in found)),
    ]
    table = format_table([("", *names), *body], left_columns=1)
    notes = [f"Δm is relative to {baselines.description}."]
    notes += [
        f"Δm of {name}: {entry.left_out}."
        for name, entry in zip(names, found, strict=True)
        if entry.left_out and entry.over_tasks is not None
    ]
    return "\n".join([table, "", *notes])


def write_comparison(run_dirs: Sequence[Path], output: Path) -> Path:
    """Writes a self-contained page that compares runs.

    Args:
      run_dirs: Folders of at least two finished runs; the baselines among them are
        chosen as in :func:`comparison_table`.
      output: The page to write; its folder must exist.

    Returns:
      ``output``.

    Raises:
      ValueError: If there are fewer than two runs, a folder holds no finished run, or
        the page can't be written.
    """
    runs = _read_runs(run_dirs)
    baselines = choose_baselines(runs)
    metric_rows = _metric_rows(runs)
    found = [_run_delta_m(run, runs, baselines) for run in runs]
    page = render(
        "comparison.html",
        title=f"{len(runs)} runs compared",
        runs=list(zip(run_labels(runs), runs, found, strict=True)),
        metric_rows=[
            (task, metric, direction(higher), _marked(values, higher))
            for (task, metric), higher, values in metric_rows
        ],
        conventions=(OVER_METRICS, OVER_TASKS),
        format_percent=format_percent,
        baselines=baselines,
        panels=_headline_panels(runs),
    )
    return write_atomically(Path(output), page)


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its folder's, or its whole path where names repeat."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]


def _read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    if len(run_dirs) < 2:
        raise ValueError(
            f"run_dirs names {len(run_dirs)} run(s): a comparison needs at least two."
        )
    return [read_run(path) for path in run_dirs]


def _metric_rows(
    runs: Sequence[Run],
) -> list[tuple[tuple[str, str], bool, list[float | None]]]:
    """Every metric of any run with its direction and its value in each run."""
    tables = [{row.key: row for row in result_rows(run.result)} for run in runs]
    merged: dict[tuple[str, str], Row] = {}
    for table in tables:
        merged = {**merged, **table}
    # Tasks stay together even where runs list different metrics of them.
    order = {
        task: index for index, task in enumerate(dict.fromkeys(t for t, _ in merged))
    }
    keys = sorted(merged, key=lambda key: order[key[0]])
    return [
        (
            key,
            merged[key].higher_is_better,
            [table[key].value if key in table else None for table in tables],
        )
        for key in keys
    ]


def _run_delta_m(run: Run, runs: Sequence[Run], baselines: Baselines) -> DeltaM:
    """A run's delta-m; none for a run that is a baseline itself."""
    single = [other for other in runs if len(other.tasks) == 1]
    if run is runs[0] if not single else len(run.tasks) == 1:
        return DeltaM(None, None, "")
    return delta_m(result_rows(run.result), baselines.values)


def _marked(values: Sequence[float | None], higher: bool) -> list[tuple[str, bool]]:
    """Values as text, each with whether it is the best of several."""
    known = [value for value in values if value is not None]
    best = (max if higher else min)(known, default=None)
    return [
        (format_value(value), len(known) > 1 and value is not None and value == best)
        for value in values
    ]


def _headline_panels(runs: Sequence[Run]) -> list[Image]:
    """Each task's headline metric over the steps, one line a run."""
    headlines = {
        row.key: None for run in runs for row in result_rows(run.result) if row.headline
    }
    panels = []
    for task, metric in headlines:
        lines = [
            Line(label, *run.series(f"{task}/{metric}"), marked=True)
            for label, run in zip(run_labels(runs), runs, strict=True)
        ]
        lines = [line for line in lines if line.values.size]
        if lines:
            alt = f"Test {metric} of {task} in each run"
            panels.append(line_panel(f"{task}: {metric}", lines, alt=alt))
    return panels
