"""Names of strangers in pages: text, whatever they hold."""

import html.parser
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np

from mtl_jax.report import write_comparison, write_report

HERE = Path(__file__).parent

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}{% x %}"


class Elements(html.parser.HTMLParser):
    """The elements of a page, with their attributes' names."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))
        self.texts += [value for _, value in attrs if value]

    def handle_data(self, data):
        self.texts.append(data)


def marked(value, mark):
    """A document with a mark behind each of its strings and keys of the user's."""
    fixed = {
        *("config", "seed", "num_steps", "tasks", "sources", "metrics", "headline"),
        *("output", "kind", "dense", "class_names", "num_classes", "value", "mesh"),
        *("higher_is_better", "constant_predictor", "train_examples", "test_examples"),
        *("examples_per_step", "image_shape", "method", "aggregator", "gradients_at"),
        *("sharpness_rho", "cost", "versions", "device", "wall_time_seconds", "fields"),
        *("classes", "values", "fiddle", "step", "parameters", "active_parameters"),
    }
    if isinstance(value, dict):
        return {
            k if k in fixed else _marked_name(k, mark): marked(v, mark)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [marked(item, mark) for item in value]
    return value + mark if isinstance(value, str) and value not in fixed else value


def _marked_name(name, mark):
    # Flat names are a task's or a source's, and what is logged of it.
    first, *rest = name.split("/")
    return "/".join([first if first == "all" else first + mark, *rest])


def test_pages_make_no_elements_of_names(tmp_path):
    specification = importlib.util.spec_from_file_location(
        "report_conftest", HERE.parent / "report" / "conftest.py"
    )
    conftest = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(conftest)
    make = conftest.make_run.__wrapped__(tmp_path)
    pages = {}
    # Names cannot hold a slash where they are parts of flat names.
    for mark in ("plain", MARKUP.replace("/", "")):
        folder = make(
            f"a{mark[:7]}", tasks=("surface", "elevation", "digit"), num_steps=4
        )
        for name in ("config.json", "result.json"):
            document = marked(json.loads((folder / name).read_text()), mark)
            (folder / name).write_text(json.dumps(document))
        result = json.loads((folder / "result.json").read_text())
        for entry in result["tasks"].values():
            # Metrics are parts of flat names behind the task's.
            entry["metrics"] = {
                k.removesuffix(mark) + mark: v for k, v in entry["metrics"].items()
            }
            entry["headline"] = next(iter(entry["metrics"]))
        (folder / "result.json").write_text(json.dumps(result))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        lines = [json.dumps(marked(json.loads(line), mark)) for line in lines]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        with np.load(folder / "samples.npz") as archive:
            samples = {_samples_name(k, mark): archive[k] for k in archive.files}
        np.savez(folder / "samples.npz", **samples)
        second = Path(shutil.copytree(folder, tmp_path / f"b{mark[:7]}"))
        write_report(folder, [second])
        write_comparison([folder, second], tmp_path / "page.html")
        texts = [
            (folder / "report.html").read_text(),
            (tmp_path / "page.html").read_text(),
        ]
        pages[mark] = [Elements(text) for text in texts]
    for plain, hostile in zip(*pages.values(), strict=True):
        assert hostile.found == plain.found
        assert not any(
            name.startswith("on") for _, *names in hostile.found for name in names
        )
        shown = "".join(hostile.texts)
        assert shown.count("alert(1)") > 20
        assert "{{ 7 * 7 }}" in shown


def _samples_name(name, mark):
    source, *rest = name.split("/")
    rest = [
        part
        if part in ("image", "target", "prediction", "routing")
        or part.startswith("block")
        else part + mark
        for part in rest
    ]
    return "/".join([source + mark, *rest])
