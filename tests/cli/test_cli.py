"""Commands about a run: how it is trained, continued, evaluated and compared."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.export
import pytest
from processes import assert_mistake, in_a_process, in_two_processes

from mtl_jax import cli, configuration, train

MAIN = ("earth_digits", "--smoke")
SMALL = ("earth_digits:single_digit", "--smoke")
TASKS = ("surface", "climate", "elevation", "log_slope", "digit", "left", "right")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a run of the main job, shrunk, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        cli.main(["train", "earth_digits", "--smoke", "--workdir", str(folder)])
    return folder, output.getvalue()


@pytest.fixture(scope="module")
def run_folder(finished_run):
    """The folder of that run."""
    return finished_run[0]


def test_a_run_folder_of_another_config(mistake, run_folder):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*.json*")}
    error = mistake(
        "train",
        *("earth_digits", "--smoke", "--workdir", run_folder),
        *("--seed", 5, "--set", "optimizer.learning_rate=1"),
    )
    assert "seed: 0 -> 5" in error
    assert "optimizer.learning_rate: 0.00" in error
    assert "-> 1.0" in error
    after = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*.json*")}
    assert after == before


def test_a_run_of_quite_another_config(mistake, run_folder):
    error = mistake("train", "earth_digits:dense", "--workdir", run_folder)
    assert len(error) < 2000
    assert re.search(r"; and \d+ more\n$", error)


def continued(run_folder, folder):
    """A copy of a run that was stopped after its first checkpoint."""
    copy = Path(shutil.copytree(run_folder, folder / "copy"))
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "4")
    return copy


def test_a_run_may_continue_on_another_mesh(
    run_folder, empty_folder, monkeypatch, capsys
):
    stops(monkeypatch)
    copy = continued(run_folder, empty_folder)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *MAIN, "--workdir", "copy", "--set", "mesh.expert=2"])
    assert exit_.value.code == 128 + 15
    output = capsys.readouterr().out
    assert (
        "continues on the mesh data=4, fsdp=1, expert=2, model=1, where it was data=2, "
        "fsdp=1, expert=4, model=1\n"
    ) in output
    assert "stopped by SIGTERM, and saved; the same command continues" in output
    saved = json.loads((copy / "config.json").read_text())
    assert saved["mesh"] == {"data": 4, "fsdp": 1, "expert": 2, "model": 1}
    assert saved["fields"]["mesh.expert"] == 2


def stops(monkeypatch):
    """Lets a run that would be trained stop at once."""

    def stop(*_, **__):
        raise train.StoppedError(15)

    monkeypatch.setattr(train, "train", stop)


def trains(*arguments):
    """Whether a command comes to train, and is stopped there."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *MAIN, "--workdir", "copy", *arguments])
    return exit_.value.code == 128 + 15


def test_a_run_that_lost_its_config_continues_under_the_same_alone(
    run_folder, empty_folder, monkeypatch, mistake
):
    stops(monkeypatch)
    copy = continued(run_folder, empty_folder)
    (copy / "config.json").unlink()
    error = mistake("train", *MAIN, "--workdir", "copy", "--seed", 5)
    assert "the checkpoint copy/checkpoints/2 is of another config; choose" in error
    assert "undo these differences: seed: 0 -> 5" in error
    assert not (copy / "config.json").exists()
    # Of another mesh it may be.
    assert trains("--set", "mesh.expert=2")


@pytest.mark.slow
def test_a_config_in_the_place_of_that_of_the_checkpoints(
    run_folder, empty_folder, monkeypatch, mistake
):
    stops(monkeypatch)
    copy = continued(run_folder, empty_folder)
    config = (copy / "config.json").read_bytes()
    (copy / "config.json").unlink()
    assert trains()
    assert (copy / "config.json").read_bytes() == config
    (copy / "config.json").write_bytes(config.replace(b'"seed": 0', b'"seed": 5'))
    error = mistake("train", *MAIN, "--workdir", "copy", "--seed", 5)
    assert "the checkpoint copy/checkpoints/2 is of another config" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_torn_document_is_deleted_and_the_run_continues(
    run_folder, empty_folder, monkeypatch, mistake, name
):
    stops(monkeypatch)
    copy = continued(run_folder, empty_folder)
    (copy / name).write_bytes((run_folder / name).read_bytes()[:100])
    error = mistake("train", *MAIN, "--workdir", "copy")
    assert f"copy/{name} is not valid JSON" in error
    assert "mend this file or delete it alone: the command that trains" in error
    (copy / name).unlink()
    assert trains()


def another_trains_first(monkeypatch, path, content):
    """Writes a file as if by another command whose lock this one waits for."""

    @contextlib.contextmanager
    def locked(_):
        path.write_bytes(content)
        yield

    monkeypatch.setattr(train, "locked", locked)


@pytest.mark.slow
def test_a_run_that_another_command_began_while_this_one_waited(
    run_folder, empty_folder, monkeypatch, mistake
):
    copy = continued(run_folder, empty_folder)
    content = (copy / "config.json").read_bytes()
    other = content.replace(b'"seed": 0', b'"seed": 5')
    another_trains_first(monkeypatch, copy / "config.json", other)
    error = mistake("train", *MAIN, "--workdir", "copy")
    assert "copy holds a run of another config" in error


def test_a_run_that_another_command_finished_while_this_one_waited(
    run_folder, empty_folder, monkeypatch, capsys
):
    stops(monkeypatch)
    copy = continued(run_folder, empty_folder)
    result = (run_folder / "result.json").read_bytes()
    another_trains_first(monkeypatch, copy / "result.json", result)
    cli.main(["train", *MAIN, "--workdir", "copy"])
    assert "report: copy/report.html" in capsys.readouterr().out


def test_a_fallback_that_is_none(run_folder, mistake, empty_folder):
    continued(run_folder, empty_folder)
    arguments = ("train", *MAIN, "--workdir", "copy", "--fallback-dir")
    assert "is in the run folder copy" in mistake(*arguments, "copy/inside")
    assert "which holds a run; continue that" in mistake(*arguments, run_folder)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metrics.jsonl", '{"ste\n', "line 1 of copy/metrics.jsonl is damaged"),
        pytest.param(
            "timings.jsonl",
            '{"step": 1}\n',
            "step 1 in timings.jsonl is damaged",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "checkpoints/2/state/_METADATA",
            "{",
            "checkpoint copy/checkpoints/2 is damag",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_cannot_be_continued(
    run_folder, mistake, empty_folder, name, content, expected
):
    copy = continued(run_folder, empty_folder)
    (copy / name).write_text(content)
    assert expected in mistake("train", *MAIN, "--workdir", "copy")


def test_a_fault_of_the_program_is_not_the_user_s(
    run_folder, empty_folder, monkeypatch, capsys
):
    def fail(*_):
        raise ValueError("cannot reshape")

    # Once all is checked, before the step is compiled, which would take long.
    monkeypatch.setattr(train.program.Program, "compile_step", fail)
    with pytest.raises(ValueError, match="cannot reshape"):
        cli.main(["train", *SMALL])
    monkeypatch.setattr(train.saved_run, "make_evaluate", fail)
    with pytest.raises(ValueError, match="cannot reshape"):
        cli.main(["eval", str(run_folder)])
    assert "mtl-jax: error" not in capsys.readouterr().err


def test_a_run_leaves_its_files(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "timings.jsonl",
        "result.json",
        "checkpoints",
        "report.html",
    }
    assert {name for name in names if name.startswith(".")} == {".lock"}
    assert {path.name for path in (run_folder / "checkpoints").iterdir()} >= {"2", "4"}


def test_the_saved_config_is_the_one_that_ran(run_folder):
    saved = json.loads((run_folder / "config.json").read_text())
    config = configuration.load_config("earth_digits", smoke=True)
    assert configuration.from_document(saved) == config
    assert saved["config"] == "earth_digits"


def test_the_metrics_are_flat_and_one_line_a_step(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert set(record) - {"step"} == {name for name in record if "/" in name}
        for task in TASKS:
            assert record[f"{task}/loss"] > 0
            assert record[f"{task}/gradient_norm"] > 0
            assert 0 <= record[f"{task}/dropped_tokens"] <= 1
            assert sum(record[f"{task}/expert_load/block_1"]) == pytest.approx(1)
        assert len(record["all/cosine"]) == len(TASKS)
        assert 0 <= record["all/conflict_rate"] <= 1
        assert ("surface/accuracy" in record) == (record["step"] in (2, 4))
    # The classes are balanced and the heads begin undecided.
    assert records[0]["digit/loss"] == pytest.approx(2.302585, abs=1e-4)


def test_the_result_holds_the_final_metrics(run_folder):
    result = json.loads((run_folder / "result.json").read_text())
    assert tuple(result["tasks"]) == TASKS
    metrics = {name: task["metrics"] for name, task in result["tasks"].items()}
    assert list(metrics["surface"]) == ["accuracy", "mean_iou"]
    assert list(metrics["elevation"]) == ["r2", "mean_absolute_error"]
    assert metrics["surface"]["accuracy"]["higher_is_better"] is True
    assert metrics["elevation"]["mean_absolute_error"]["higher_is_better"] is False
    # The majority of the test tiles' pixels; the best constant explains nothing.
    assert 0.5 <= metrics["surface"]["accuracy"]["constant_predictor"] < 1
    assert metrics["elevation"]["r2"]["constant_predictor"] == 0
    for task in metrics.values():
        assert all(isinstance(metric["value"], float) for metric in task.values())
    assert (result["config"], result["seed"], result["num_steps"]) == (
        "earth_digits",
        0,
        4,
    )
    assert result["wall_time_seconds"] > 0
    assert {"python", "jax", "flax", "optax", "mtl_jax"} <= set(result["versions"])
    assert result["device"].startswith("8 × ")
    assert result["mesh"] == {"data": 2, "fsdp": 1, "expert": 4, "model": 1}


def test_the_report_needs_no_other_file(run_folder):
    page = (run_folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    for task in TASKS:
        assert task in page


def values(output):
    """The numbers of the last table that was printed, row by row, below its rule."""
    return re.findall(r"-?\d+\.\d+", output.rpartition("─")[2])


def test_a_finished_run_is_not_trained_again(finished_run, capsys):
    run_folder, trained = finished_run
    before = (run_folder / "result.json").read_bytes()
    cli.main(["train", "earth_digits", "--smoke", "--workdir", str(run_folder)])
    output = capsys.readouterr().out
    assert "finished run; nothing to train" in output
    assert "report.html" in output
    assert values(output) == values(trained)
    assert (run_folder / "result.json").read_bytes() == before


def test_a_finished_run_with_damaged_metrics(run_folder, mistake, empty_folder):
    copy = Path(shutil.copytree(run_folder, empty_folder / "copy"))
    (copy / "metrics.jsonl").write_text("{")
    arguments = ("earth_digits", "--smoke", "--workdir", "copy")
    assert "metrics.jsonl, line 1" in mistake("train", *arguments)


@pytest.fixture
def untouched(run_folder):
    """A run in whose folder nothing is made, written or removed, not even for a moment.

    Then the time of a folder or file would be another one.
    """

    def times():
        paths = [run_folder, *run_folder.rglob("*")]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()
    yield
    assert times() == before


@pytest.mark.usefixtures("untouched")
def test_eval_finds_the_metrics_of_the_result(finished_run, capsys):
    run_folder, trained = finished_run
    cli.main(["eval", str(run_folder)])
    evaluated = capsys.readouterr().out
    assert "checkpoint of step 4" in evaluated
    found = values(evaluated)
    assert len(found) > len(TASKS)
    assert found == values(trained.replace(str(run_folder), ""))


@pytest.mark.usefixtures("untouched")
def test_export_writes_a_program_and_what_it_takes(run_folder, capsys, empty_folder):
    cli.main(
        ["export", str(run_folder), "--task", "climate", "--output", "a/climate.bin"]
    )
    assert "from the checkpoint of step 4" in capsys.readouterr().out
    description = json.loads((empty_folder / "a" / "climate.json").read_text())
    assert description["input"]["shape"] == ["batch", 32, 32, 3]
    assert description["output"]["class_names"][0] == "tropical"
    data = bytearray((empty_folder / "a" / "climate.bin").read_bytes())
    output = jax.export.deserialize(data).call(jax.numpy.zeros((2, 32, 32, 3), "uint8"))
    assert output.shape == (2, 32, 32, 5)


def test_export_of_a_task_there_is_not(run_folder, mistake):
    error = mistake("export", run_folder, "--task", "depth")
    assert "task is 'depth'; the run has surface, climate" in error
    assert "holds no run" in mistake("export", "nowhere", "--task", "depth")


def test_eval_of_a_checkpoint_there_is_not(run_folder, mistake):
    error = mistake("eval", run_folder, "--step", 3)
    assert "has no checkpoint 3; it has [2, 4]" in error


def test_eval_of_a_checkpoint_of_another_config(run_folder, mistake, empty_folder):
    config = configuration.load_config("earth_digits", smoke=True)
    configuration.override(config, ["trunk.width=48"])
    document = configuration.to_document(config, "earth_digits")
    (empty_folder / "config.json").write_text(json.dumps(document))
    shutil.copytree(run_folder / "checkpoints", empty_folder / "checkpoints")
    error = mistake("eval", ".")
    assert len(error) < 2000
    assert " does not fit the config (" in error
    found = re.search(r": (params/\S+) is float32 \((.*?)\) in the checkpoint", error)
    assert found
    assert (
        f"{found[1]} is float32 ({found[2]}) in the checkpoint and float32 (" in error
    )
    assert re.search(r"and \d+ more differ; use the config that it was trained", error)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(os.remove, marks=pytest.mark.slow),
        lambda file: os.truncate(file, 100),
    ],
)
def test_eval_of_a_damaged_checkpoint(run_folder, empty_folder, damage):
    copy = Path(shutil.copytree(run_folder, empty_folder / "copy"))
    for file in (copy / "checkpoints" / "4" / "state").glob("**/d/*"):
        damage(file)
    command = ("eval", "copy", "--devices", 8)
    finished = in_a_process(*command, "--step", 4, cwd=empty_folder)
    assert_mistake(finished, "the checkpoint copy/checkpoints/4 is damaged")
    assert len(finished.stderr) < 400


def test_eval_prints_nothing_but_the_mistake(run_folder, empty_folder):
    finished = in_a_process("eval", run_folder, "--step", 3, "--devices", 8)
    assert_mistake(finished, "has no checkpoint 3")


def test_eval_of_a_run_without_checkpoints(run_folder, mistake, empty_folder):
    shutil.copy(run_folder / "config.json", empty_folder)
    assert "has no checkpoints yet" in mistake("eval", ".")
    assert not (empty_folder / "checkpoints").exists()


def test_eval_of_a_run_whose_config_names_what_it_must_not(
    run_folder, mistake, empty_folder
):
    text = (run_folder / "config.json").read_text()
    hostile = re.sub(
        r'"mtl_jax\.layers\.heads",(\s+)"name": "DensePrediction"',
        r'"os",\1"name": "system"',
        text,
    )
    assert hostile != text
    (empty_folder / "config.json").write_text(hostile)
    assert "config.json names os.system" in mistake("eval", ".")


def test_report_writes_the_page_again(run_folder, empty_folder, capsys):
    copy = Path(shutil.copytree(run_folder, empty_folder / "copy"))
    (copy / "report.html").unlink()
    cli.main(["report", "copy"])
    assert capsys.readouterr().out.strip() == "copy/report.html"
    assert (copy / "report.html").stat().st_size > 10_000


def test_report_of_what_is_no_finished_run(run_folder, mistake, empty_folder):
    shutil.copy(run_folder / "config.json", empty_folder)
    assert "has not finished" in mistake("report", ".")
    assert "nowhere is not a folder" in mistake("report", "nowhere")
    assert "nowhere" in mistake("report", run_folder, "--baselines", "nowhere")


def test_compare_writes_a_table_and_a_page(run_folder, empty_folder, capsys):
    shutil.copytree(run_folder, empty_folder / "second")
    cli.main(["compare", str(run_folder), "second", "--output", "page.html"])
    output = capsys.readouterr().out
    for name in ("first", "second", "surface/accuracy", "page.html"):
        assert name in output
    assert (empty_folder / "page.html").stat().st_size > 1000


def test_compare_of_nonsense(run_folder, mistake, empty_folder):
    assert "at least two" in mistake("compare", run_folder)
    assert "nowhere" in mistake("compare", run_folder, "nowhere")
    assert "holds no result.json" in mistake("compare", run_folder, ".")
    error = mistake("compare", run_folder, run_folder, "--output", "no/page.html")
    assert "no/page.html" in error


def test_of_two_processes_one_prints_and_writes(run_folder, empty_folder):
    copy = Path(shutil.copytree(run_folder, empty_folder / "copy"))
    (copy / "report.html").unlink()
    first, second = in_two_processes(
        "train", *MAIN, "--workdir", "copy", cwd=empty_folder
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "finished run; nothing to train" in first.stdout
    assert (copy / "report.html").is_file()
    # All but what the library of collectives says of itself.
    lines = second.stdout.splitlines()
    assert [line for line in lines if not line.startswith("[Gloo]")] == []


def test_features_that_tasks_do_not_share(mistake):
    arguments = ("earth_digits", "--smoke", "--set", "gradients_at=features")
    assert 'use gradients_at="params"' in mistake("train", *arguments)


def test_show_prints_the_config_and_the_sharding(capsys, empty_folder):
    cli.main(["show", "earth_digits", "--smoke", "--seed", "3"])
    output = capsys.readouterr().out
    assert "seed = 3\n" in output
    assert "trunk.moe.num_experts = 8\n" in output
    assert "mesh {'data': 2, 'fsdp': 1, 'expert': 4, 'model': 1}" in output
    experts = [line for line in output.splitlines() if "experts/up/kernel" in line]
    assert len(experts) == 1
    assert "expert" in experts[0].replace("experts/", "")
    assert list(empty_folder.iterdir()) == []
