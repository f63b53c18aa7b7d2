"""The page of one run: ``report.html``, complete in one file."""

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mtl_jax.report.curves import gradient_norm_panels, loss_panels, metric_panels
from mtl_jax.report.delta_m import OVER_METRICS, OVER_TASKS
from mtl_jax.report.heat_maps import cosine_images, expert_images
from mtl_jax.report.quantities import (
    bytes_text,
    count_text,
    duration_text,
    rate_text,
    share_text,
)
from mtl_jax.report.results import (
    Baselines,
    Row,
    choose_baselines,
    delta_m,
    direction,
    format_percent,
    format_value,
    result_rows,
)
from mtl_jax.report.routing import routed_images
from mtl_jax.report.run_folder import Run, read_run
from mtl_jax.report.tiles import dense_tasks, labelled_images


def write_report(run_dir: Path, baselines: Sequence[Path] = ()) -> Path:
    """Writes the page that shows what a run learned, as one self-contained file.

    All images lie inside the page, which asks for nothing from outside and runs no
    script. An existing page is replaced in one step.

    Args:
      run_dir: The folder of a finished run.
      baselines: Folders of runs to compare with: single-task runs, each the baseline of
        its task, or else one run (the first) that is the baseline of every task.

    Returns:
      The page, ``run_dir / "report.html"``.

    Raises:
      ValueError: If a folder holds no finished run or a damaged file, or the page can't
        be written.
    """
    run = read_run(run_dir)
    compared = [read_run(path) for path in baselines]
    reference = choose_baselines(compared) if compared else None
    page = render("report.html", **report_context(run, reference))
    return write_atomically(run.path / "report.html", page)


def report_context(run: Run, baselines: Baselines | None) -> dict[str, Any]:
    """Everything that the template of a run's page shows.

    Args:
      run: The run.
      baselines: What its metrics are compared with, if anything.

    Returns:
      Plain values, images and rows by the names that the template uses.
    """
    result = run.result
    values = baselines.values if baselines else {}
    rows = result_rows(result)
    _, conflict = run.series("all/conflict_rate")
    return {
        "title": result["config"],
        "run": run,
        "result": result,
        "method": _method(result),
        "device": result.get("device"),
        "wall_time": _wall_time(result),
        "rows": [_table_row(row, values) for row in rows],
        "baselines": baselines,
        "delta_m": _delta_m(rows, baselines),
        "sources": [
            _source_row(name, source) for name, source in result["sources"].items()
        ],
        "losses": loss_panels(run),
        "metrics": metric_panels(run, values),
        "cosines": cosine_images(run),
        "gradient_norms": gradient_norm_panels(run),
        "conflict_rate": _mean_share(conflict),
        "experts": expert_images(run),
        "routed_images": routed_images(run),
        "dropped_tokens": _dropped_tokens(run),
        "dense_tasks": dense_tasks(run),
        "labelled_images": labelled_images(run),
        "cost": _cost_cards(run),
        "settings": _settings(result),
        "config_fields": run.config_fields,
        "versions": result.get("versions") or {},
    }


def render(template: str, **context: Any) -> str:
    """Renders one of the package's templates, escaping every string.

    Args:
      template: File name in ``templates/``.
      **context: What the template shows.

    Returns:
      The page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def write_atomically(path: Path, text: str) -> Path:
    """Writes a file so that a reader finds the old or the new one, never a part.

    Args:
      path: The file; its folder must exist.
      text: Its contents, written as UTF-8.

    Returns:
      ``path``.

    Raises:
      ValueError: If it can't be written.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)  # mkstemp's files are private
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise ValueError(
            f"{path} can't be written ({error.strerror}): choose a folder that exists "
            "and that you may write to."
        ) from None
    return path


def _table_row(row: Row, baselines: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """One metric as the result table shows it."""
    baseline = baselines.get(row.key)
    difference = None if row.value is None or baseline is None else row.value - baseline
    better = difference is not None and (difference > 0) == row.higher_is_better
    return {
        "task": row.task,
        "metric": row.metric,
        "arrow": direction(row.higher_is_better),
        "direction": "higher is better" if row.higher_is_better else "lower is better",
        "value": format_value(row.value),
        "constant_predictor": format_value(row.constant_predictor),
        "baseline": format_value(baseline),
        "difference": ("+" if (difference or 0) > 0 else "") + format_value(difference),
        "verdict": "" if not difference else "better" if better else "worse",
        "headline": row.headline,
    }


def _delta_m(rows: Sequence[Row], baselines: Baselines | None) -> dict[str, Any] | None:
    """Delta-m in both conventions, labelled, or None without baselines."""
    if baselines is None:
        return None
    found = delta_m(rows, baselines.values)
    return {
        "lines": [
            (OVER_METRICS, format_percent(found.over_metrics)),
            (OVER_TASKS, format_percent(found.over_tasks)),
        ],
        "left_out": found.left_out,
    }


def _source_row(name: str, source: Mapping[str, Any]) -> dict[str, str]:
    """One data source as the table of sources shows it."""
    return {
        "name": name,
        "train": count_text(source.get("train_examples")),
        "test": count_text(source.get("test_examples")),
        "per_step": count_text(source.get("examples_per_step")),
        "shape": " × ".join(map(str, source.get("image_shape") or ())),
        "tasks": ", ".join(source.get("tasks") or ()),
    }


def _dropped_tokens(run: Run) -> list[tuple[str, str]]:
    """Each task's mean share of tokens that found no room at their expert."""
    logged = [(task, run.series(f"{task}/dropped_tokens")[1]) for task in run.tasks]
    return [(task, _mean_share(values)) for task, values in logged if values.size]


def _mean_share(values: np.ndarray) -> str:
    """The mean of what is logged, as a percentage; empty if nothing is."""
    finite = values[np.isfinite(values)]
    return share_text(float(finite.mean())) if finite.size else ""


def _wall_time(result: Mapping[str, Any]) -> str:
    """How long the run took; empty where that wasn't recorded."""
    seconds = result.get("wall_time_seconds")
    return "" if seconds is None else duration_text(seconds)


def _method(result: Mapping[str, Any]) -> str:
    """How task gradients were combined, in a few words."""
    method = result.get("method") or {}
    text = str(method.get("aggregator") or "an unnamed aggregator")
    if method.get("gradients_at"):
        text += f" on gradients at {method['gradients_at']}"
    if method.get("sharpness_rho"):
        text += f", sharpness-aware with ρ = {method['sharpness_rho']:g}"
    return text


def _cost_cards(run: Run) -> list[tuple[str, str]]:
    """Label and value of each cost, in the order of the page."""
    cost = run.result.get("cost") or {}
    timed = [timing.get("seconds_per_step") for timing in run.timings]
    seconds = [value for value in timed if value is not None]
    return [
        ("parameters", count_text(cost.get("parameters"))),
        ("active parameters an example", count_text(cost.get("active_parameters"))),
        ("FLOPs a step", count_text(cost.get("flops_per_step"))),
        ("examples a second", rate_text(cost.get("examples_per_second"))),
        ("median step", duration_text(float(np.median(seconds)) if seconds else None)),
        ("peak memory", bytes_text(cost.get("peak_memory_bytes"))),
        ("input stall", share_text(cost.get("input_stall"))),
        ("compilation", duration_text(cost.get("compile_seconds"))),
    ]


def _settings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Method, mesh and machine as label and value."""
    mesh = result.get("mesh") or {}
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.items())
    return [
        ("task gradients", _method(result)),
        ("mesh", axes or "one device"),
        ("device", str(result.get("device") or "not recorded")),
        ("seed", str(result["seed"])),
        ("steps", count_text(result["num_steps"])),
        ("wall time", duration_text(result.get("wall_time_seconds"))),
    ]
