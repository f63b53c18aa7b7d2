"""Reading run folders: values as written, and one clear line for each damage."""

import json

import numpy as np
import pytest

from mtl_jax.report.run_folder import read_run


def test_reads_series(make_run):
    folder = make_run("main", tasks=("surface", "digit"), num_steps=20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    run = read_run(folder)

    steps, losses = run.series("surface/loss")
    assert steps.tolist() == list(range(1, 21))
    assert losses.tolist() == [json.loads(line)["surface/loss"] for line in lines]
    steps, _ = run.series("surface/accuracy")
    assert steps.tolist() == list(range(2, 21, 2))
    _, cosines = run.series("all/cosine")
    assert cosines.shape == (20, 2, 2)
    assert np.isnan(cosines[9, 0]).all()
    assert run.series("nothing/here")[1].size == 0
    assert run.tasks == ("surface", "digit")


def test_null_and_nan_are_absent_or_nan(make_run):
    folder = make_run("main", tasks=("digit",))
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "digit/loss": null}\n{"step": 2, "digit/loss": NaN}\n'
        '{"step": 3, "digit/loss": 0.5}\n'
    )
    steps, values = read_run(folder).series("digit/loss")
    assert steps.tolist() == [2, 3]
    assert np.isnan(values[0])
    assert values[1] == 0.5


def test_optional_files_may_be_absent(make_run):
    folder = make_run("main", tasks=("digit",), samples=False)
    (folder / "timings.jsonl").unlink()
    run = read_run(folder)
    assert run.samples == {}
    assert run.timings == ()


def test_unfinished_run(make_run):
    folder = make_run("main", tasks=("digit",))
    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match=r"no result\.json: the run has not finished"):
        read_run(folder)


def test_absent_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_absent_file(make_run, name):
    folder = make_run("main", tasks=("digit",))
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}"):
        read_run(folder)


@pytest.mark.parametrize(
    "line", ['{"step": 3, "digit/lo', "[1]", "{}", '{"step": "3"}']
)
def test_damaged_line_is_named(make_run, line):
    folder = make_run("main", tasks=("digit",))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], line]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: not ") as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


def test_truncated_result(make_run):
    folder = make_run("main", tasks=("digit",))
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"result\.json, line 1: not valid JSON"):
        read_run(folder)


@pytest.mark.parametrize("key", ["config", "tasks", "sources"])
def test_result_lacks_a_key(make_run, key):
    folder = make_run("main", tasks=("digit",))
    result = json.loads((folder / "result.json").read_text())
    del result[key]
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        read_run(folder)


def test_unknown_headline(make_run):
    folder = make_run("main", tasks=("digit",))
    result = json.loads((folder / "result.json").read_text())
    result["tasks"]["digit"]["headline"] = "recall"
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="headline 'recall' of task 'digit'"):
        read_run(folder)


def test_empty_metrics(make_run):
    folder = make_run("main", tasks=("digit",))
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty"):
        read_run(folder)


def test_damaged_samples(make_run):
    folder = make_run("main", tasks=("digit",))
    data = (folder / "samples.npz").read_bytes()
    (folder / "samples.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"samples\.npz can't be read"):
        read_run(folder)


def test_pickles_are_refused(make_run):
    folder = make_run("main", tasks=("digit",))
    np.savez(folder / "samples.npz", **{"digits/image": np.array([{}], object)})
    with pytest.raises(ValueError, match=r"samples\.npz can't be read"):
        read_run(folder)
