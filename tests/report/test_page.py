"""The pages as text: what they say, and that nothing in them is trusted."""

import json
import re
import subprocess
import sys

import pytest

from mtl_jax.report import comparison_table, write_comparison, write_report
from mtl_jax.report.page import write_atomically


def text_of(page):
    """The words of a page, without its tags, styles and images."""
    html = page.read_text(encoding="utf-8")
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html).replace("&nbsp;", " "))


def test_report_says_everything(make_run):
    main = make_run("main", num_steps=20)
    surface = make_run("surface_only", tasks=("surface",), scale=0.9)
    page = write_report(main, [surface])
    assert page == main / "report.html"
    text = text_of(page)
    for words in (
        "7 tasks from 3 data sources (earth, digits, multi_digits) for 20 steps",
        "9,000",
        "32 × 32 × 3",
        "surface, climate, elevation, slope",
        # 0.95 against 0.9 · 0.95 = 0.855
        "0.9500 0.7900 0.8550 +0.0950 better",
        # Gains of 11.11 % (0.95/0.855 - 1) and of 10 % (0.2 against 0.2222).
        "Δm over metrics (lower is better; Nash-MTL, CAGrad) −10.56 %",
        "Δm over tasks (higher is better; LibMTL) +10.56 %",
        "single-task runs surface_only",
        "Expert use by task and layer",
        "Misclassified test images",
        "ocean land no label",
        "1.23 M",
        "peak memory not measured",
        "median step 200 ms",
        "6 min 12 s",
        "data 1 × fsdp 1 × expert 1 × model 1",
        "model.trunk.num_experts 8",
        "jax 0.10.1",
    ):
        assert words in text, words


def test_report_without_optional_parts(make_run):
    folder = make_run("single", tasks=("digit",), dense_trunk=True, samples=False)
    result = json.loads((folder / "result.json").read_text())
    (folder / "timings.jsonl").unlink()
    for key in ("cost", "mesh", "method", "versions", "device", "wall_time_seconds"):
        del result[key]
    (folder / "result.json").write_text(json.dumps(result))
    text = text_of(write_report(folder))
    assert "1 task from 1 data source (digits)" in text
    assert "unnamed aggregator" in text
    for words in ("Expert use", "cosine", "Δm", "baseline", "Misclassified", "None"):
        assert words not in text, words


def test_every_string_is_escaped(make_run):
    folder = make_run("main", tasks=("surface", "digit"), num_steps=10)
    evil = "<script>alert(1)</script>\\\"'&"
    for name in ("result.json", "config.json", "metrics.jsonl"):
        text = (folder / name).read_text()
        for word in ("ocean", "surface", "earth_digits", "pcgrad", "num_experts"):
            text = text.replace(word, word + evil)
        (folder / name).write_text(text)
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_page_names_nothing_outside(make_run):
    html = write_report(
        make_run("main", tasks=("surface", "digit"), num_steps=10)
    ).read_text(encoding="utf-8")
    words = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", html)
    assert re.findall(r"https?:|//|@import|url\(", words) == []
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(source.startswith(("data:", "#")) for source in sources)


def test_report_is_reproducible_and_replaced(make_run):
    folder = make_run("main", tasks=("surface", "digit"), num_steps=10)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "samples.npz",
        "timings.jsonl",
    ]


def test_unwritable_page(tmp_path):
    with pytest.raises(ValueError, match=r"page\.html can't be written \(No such file"):
        write_atomically(tmp_path / "nowhere" / "page.html", "")


def test_a_failed_write_leaves_the_old_page(tmp_path):
    page = write_atomically(tmp_path / "page.html", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(page, "new \ud800")
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_comparison_with_single_task_runs(make_run):
    runs = [
        make_run("main", tasks=("surface", "digit")),
        make_run("surface_only", tasks=("surface",), scale=0.9),
        make_run("digit_only", tasks=("digit",)),
    ]
    table = comparison_table(runs)
    lines = table.splitlines()
    assert lines[0].split() == ["main", "surface_only", "digit_only"]
    assert lines[2].split() == ["surface/accuracy", "↑", "0.9500", "0.8550", "–"]
    # Gains: surface 11.11 % and 10 %, digit 0 and 0.
    by_name = {line.split("  ")[0]: line.split("  ")[-3:] for line in lines}
    label = "Δm over metrics (lower is better; Nash-MTL, CAGrad)"
    assert "−5.28 %" in next(line for line in lines if line.startswith(label))
    assert "Δm over tasks (higher is better; LibMTL)" in by_name
    assert lines[-1] == (
        "Δm is relative to the single-task runs surface_only, digit_only."
    )

    page = write_comparison(runs, runs[0].parent / "compare.html")
    text = text_of(page)
    assert "main earth_digits:main 0 −5.28 % +5.28 %" in text
    assert "surface_only earth_digits:surface_only 0 – –" in text
    assert "single-task runs surface_only, digit_only" in text


def test_comparison_without_single_task_runs(make_run):
    first = make_run("first", tasks=("surface", "digit"))
    second = make_run("second", tasks=("surface", "digit"), scale=1.1)
    table = comparison_table([first, second])
    # Gains: 10 % (value · 1.1) and 1 - 1/1.1 = 9.09 %.
    assert "+9.55 %" in table
    assert "Δm is relative to the first run, first, for want of single-task" in table


def test_comparison_needs_two_runs(make_run):
    with pytest.raises(ValueError, match="at least two"):
        comparison_table([make_run("main", tasks=("digit",))])


def test_report_imports_no_jax():
    code = "import sys, mtl_jax.report; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
