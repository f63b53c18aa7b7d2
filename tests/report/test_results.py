"""Rows, text tables, baselines and quantities."""

import json

import pytest

from mtl_jax.report import format_table, results_table
from mtl_jax.report.quantities import (
    bytes_text,
    count_text,
    duration_text,
    rate_text,
    share_text,
)
from mtl_jax.report.results import (
    Row,
    choose_baselines,
    delta_m,
    format_value,
    single_task_baselines,
)
from mtl_jax.report.run_folder import read_run


def test_results_table(make_run):
    folder = make_run("main", tasks=("surface",))
    rows = results_table(json.loads((folder / "result.json").read_text()))
    assert rows == [
        ("task", "metric", "value", "constant predictor"),
        ("surface", "accuracy ↑", "0.9500", "0.7900"),
        ("surface", "error ↓", "0.2000", "–"),
    ]
    assert format_table(rows) == (
        "task     metric       value  constant predictor\n"
        "───────  ──────────  ──────  ──────────────────\n"
        "surface  accuracy ↑  0.9500              0.7900\n"
        "surface  error ↓     0.2000                   –"
    )


def test_undefined_metric_is_absent(make_run):
    folder = make_run("main", tasks=("surface",))
    result = json.loads((folder / "result.json").read_text())
    result["tasks"]["surface"]["metrics"]["accuracy"]["value"] = float("nan")
    assert results_table(result)[1][2] == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.95, "0.9500"), (-0.5, "−0.5000"), (1234.567, "1,234.6"), (None, "–")],
)
def test_format_value(value, text):
    assert format_value(value) == text


def test_single_task_runs_are_the_baselines(make_run):
    names = [("a", "surface", 1.0), ("b", "surface", 0.9), ("c", "digit", 1.0)]
    single = [
        read_run(make_run(name, tasks=(task,), scale=scale))
        for name, task, scale in names
    ]
    main = read_run(make_run("main", tasks=("surface", "digit")))
    baselines = choose_baselines([main, *single])
    assert baselines.values["digit", "accuracy"] == pytest.approx(0.97)
    # Two runs of one task are averaged: (0.95 + 0.855) / 2.
    assert baselines.values["surface", "accuracy"] == pytest.approx(0.9025)
    assert "single-task runs a, b, c, averaged" in baselines.description


def test_without_single_task_runs_the_first_is_the_baseline(make_run):
    first = read_run(make_run("first", tasks=("surface", "digit")))
    second = read_run(make_run("second", tasks=("surface", "digit"), scale=1.01))
    assert single_task_baselines([first, second]) is None
    baselines = choose_baselines([first, second])
    assert baselines.values["digit", "accuracy"] == pytest.approx(0.97)
    assert "first run, first" in baselines.description


def test_delta_m_leaves_out_what_has_no_positive_baseline():
    rows = [
        Row("a", "x", 1.1, True, None, True),
        Row("a", "y", 5.0, True, None, False),
        Row("b", "r2", 0.5, True, None, True),
        Row("c", "x", None, True, None, True),
    ]
    found = delta_m(rows, {("a", "x"): 1.0, ("b", "r2"): -0.1, ("c", "x"): 1.0})
    assert found.over_metrics == pytest.approx(-10)
    assert found.over_tasks == pytest.approx(10)
    assert found.left_out.startswith("without a/y, b, c ")
    assert delta_m(rows, {}).over_tasks is None


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (count_text, None, "not measured"),
        (count_text, 456789, "456,789"),
        (count_text, 1.23e10, "12.3 G"),
        (count_text, 999_999_999, "1 G"),
        (rate_text, 512.4, "512"),
        (rate_text, 0.25, "0.25"),
        (bytes_text, 512, "512 B"),
        (bytes_text, 3 * 2**29, "1.5 GiB"),
        (bytes_text, 1023 * 2**20, "1,023 MiB"),
        (duration_text, 0.1234, "123 ms"),
        (duration_text, 9.97, "10 s"),
        (duration_text, 372.4, "6 min 12 s"),
        (duration_text, 59.7, "1 min 0 s"),
        (duration_text, 7325, "2 h 2 min"),
        (share_text, 0.013, "1.3 %"),
        (share_text, 0.5, "50 %"),
        (share_text, 0.0, "0 %"),
    ],
)
def test_quantities(function, value, text):
    assert function(value) == text
