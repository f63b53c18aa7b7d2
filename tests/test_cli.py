import contextlib
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import pytest

from mtl_jax import cli, configuration, train

ROOT = Path(__file__).parent.parent
MAIN = ("earth_digits", "--smoke")
SMALL = ("earth_digits:single_digit", "--smoke")
TASKS = ("surface", "climate", "elevation", "log_slope", "digit", "left", "right")


@pytest.fixture(scope="module", autouse=True)
def standard_dtype_promotion():
    """Optax's schedules and its Adam mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def mistake(capsys, empty_folder):
    """Runs a command that must fail as a user's mistake; returns its one line."""

    def run(*arguments):
        before = sorted(empty_folder.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        assert re.fullmatch(r"mtl-jax: error: .+\n", error)
        assert sorted(empty_folder.rglob("*")) == before
        return error

    return run


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


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian", "earth_digits"),
        ("train",),
        ("train", "earth_digits", "--sede", "3"),
        ("train", "earth_digits", "--seed", "three"),
        ("train", "earth_digits", "--devices", "many"),
        ("eval", "run", "--step", "last"),
        ("compare",),
    ],
    ids=str,
)
def test_a_command_line_that_cannot_be_read(mistake, arguments):
    assert "--help" in mistake(*arguments)


@pytest.mark.parametrize("command", ["train", "show"])
def test_an_unknown_config_lists_the_known(mistake, command):
    error = mistake(command, "earth_digit")
    assert "unknown config 'earth_digit'" in error
    for name in configuration.known_configs():
        assert name in error


def test_an_unknown_variant_lists_the_known(mistake):
    error = mistake("train", "earth_digits:moon")
    assert "'moon'" in error
    assert "shared_router" in error


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("trunk.moe.num_expert=4", "did you mean 'num_experts'?"),
        ("seed=three", "seed is 'three' of type str; it must be int"),
        ("num_steps=1.5", "it must be int"),
        ("seed", "not of the form path=value"),
        ("num_steps=0", "num_steps is 0; it must be at least 1"),
        ("evaluation_examples=0", "evaluation_examples is 0"),
        ("tasks.digit.name=letter", "task 'letter' has no labelled source"),
        ("mixture.components.digits.tasks=()", "'digit' has no labelled source"),
        ("mixture.components.digits.weight=0", "'digit' has no labelled source"),
        ("mixture.components.digits.tasks=('digit','moon')", "unknown tasks ['moon']"),
        ("mixture.components.digits.tasks=('digit','digit')", "name each task once"),
        ("mixture.components.digits.weight=-1", "digits.weight is -1.0; it must be"),
        ("mixture.components.digits.weight=1e400", "digits.weight is inf"),
        ("tasks.digit.name=all", "'all' is no name for a task"),
        ("tasks.digit.name=a/b", "'a/b' is no name for a task"),
        ("tasks.digit.metrics=()", "tasks.digit.metrics are []; give at least one"),
        ("tasks.digit.target=letter", "no field 'letter', which task 'digit' needs"),
        ("mixture.components.digits.input_field=x", "no field 'x'"),
        ("mixture.components.digits.input_field=digit", "height, width and channels"),
        ("mixture.components.digits.train.split=dev", "digits.train: split 'dev' is"),
        ("tasks.digit.head.num_classes=9", "head of task 'digit' predicts shape (9,)"),
        ("trunk.num_tasks=3", "trunk.num_tasks is 3, but there are 1 tasks"),
        ("trunk.patch_size=8", "patch_size is 8"),
        ("trunk.width=-4", "trunk.width is -4; it must be at least 1"),
        ("trunk.width=1000000000000", "it must be at least 1 and at most"),
        ("trunk.depth=0", "trunk.depth is 0; it must be at least 1"),
        ("trunk.depth=100000", "trunk.depth is 100000; it must be"),
        ("trunk.num_heads=-1", "trunk.num_heads is -1"),
        ("trunk.num_heads=5", "num_heads=5 does not divide the width 24"),
        ("trunk.patch_size=0", "trunk.patch_size is 0"),
        ("trunk.mlp_ratio=0", "trunk.mlp_ratio is 0"),
        ("trunk.num_channels=-3", "trunk.num_channels is -3"),
        ("trunk.dtype=float33", "trunk.dtype is 'float33'; use a floating-point"),
        ("trunk.dtype=complex64", "trunk.dtype is 'complex64'; use a floating-point"),
        ("trunk.moe.group_size=0", "group_size is 0; it must be at least 1"),
        ("trunk.moe.num_experts=0", "trunk.moe.num_experts is 0"),
        ("trunk.moe.num_selected=9", "num_selected is 9; it must be at least 1 and at"),
        ("trunk.moe.expert_hidden=-1", "trunk.moe.expert_hidden is -1"),
        (
            "trunk.moe.router.load_weight=-1",
            "router.load_weight is -1.0; it must be at",
        ),
        (
            "trunk.moe.router.noise_std=1e400",
            "router.noise_std is inf; it must be finite",
        ),
        ("trunk.moe.dtype=bfloat16", "set trunk.dtype instead"),
        ("trunk.moe.num_tasks=1", "set trunk.num_tasks instead"),
        ("tasks.digit.head.num_classes=0", "tasks.digit.head.num_classes is 0"),
        ("tasks.digit.head.dtype=int8", "tasks.digit.head.dtype is 'int8'"),
        ("optimizer.learning_rate=1e400", "optimizer.learning_rate is inf"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate is -1.0; it must be"),
        ("optimizer.num_steps=3", "optimizer.num_steps is 3; leave it out"),
        ("aggregator.num_tasks=3", "aggregator.num_tasks is 3; leave it out"),
        ("num_steps=10000000000", "it must be less than 2**31"),
        ("num_steps=1000000000000000000000", "it must be less than 2**63"),
        (
            "mixture.batch_size=1000000000000",
            "mixture.batch_size is 1000000000000; the",
        ),
        ("evaluation_batch_size=1000000000000", "evaluation_batch_size is 1000000"),
        ("rules.batch=nope", "rules.batch is 'nope'; choose from the mesh axes data,"),
        ("rules.batch=model", "rules.batch is 'model'; choose from"),
        ("rules.tokens=('data','data')", "each at most once"),
        ("evaluation_batch_size=30", "evaluation_batch_size is 30"),
        ("evaluation_batch_size=4", "evaluation_batch_size is 4"),
        ("mixture.batch_size=33", "mixture.batch_size is 33"),
        ("mixture.temperature=0", "mixture.temperature is 0"),
        ("mesh.expert=3", "do not divide 8 devices"),
        ("mesh.data=0", "must be positive"),
        ("trunk.moe.num_experts=6", "of size 6 does not divide"),
    ],
)
def test_a_config_that_does_not_fit(mistake, assignment, expected):
    assert expected in mistake("train", *SMALL, "--set", assignment)


def test_features_that_tasks_do_not_share(mistake):
    arguments = ("earth_digits", "--smoke", "--set", "gradients_at=features")
    assert 'use gradients_at="params"' in mistake("train", *arguments)


@pytest.mark.parametrize("number", [0, -3, 10**9])
def test_devices_there_cannot_be(mistake, number):
    error = mistake("train", *SMALL, "--devices", number)
    assert f"--devices is {number}; it must be at least 1" in error


def test_a_platform_there_is_not(empty_folder, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    finished = in_a_process("show", *SMALL, cwd=empty_folder)
    assert_mistake(finished, "JAX has no devices")


def test_output_that_nobody_reads():
    command = [sys.executable, str(ROOT / "run.py"), "show", *SMALL]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_loss_defined_in_the_config(mistake, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from mtl_jax.configuration import load_config\n"
        "def own_loss(prediction, target):\n"
        "    return prediction, target\n"
        "def main():\n"
        "    config = load_config('earth_digits:single_digit', smoke=True)\n"
        "    config.tasks[0].loss = own_loss\n"
        "    return config\n"
        "VARIANTS = {'main': main}\n"
    )
    for command in ("train", "show"):
        error = mistake(command, path)
        assert "tasks.digit.loss is own_loss, which config.json cannot name" in error


def test_a_config_that_fails(mistake, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("import fiddle\nimport no_such_module\n")
    assert "own.py, line 2: ModuleNotFoundError" in mistake("train", path)


def in_a_process(*arguments, folder=ROOT, cwd=None):
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_mistake(finished, expected):
    assert finished.returncode == 2, finished.stderr
    assert re.fullmatch(r"mtl-jax: error: .+\n", finished.stderr)
    assert expected in finished.stderr
    assert finished.stdout == ""


def test_a_mesh_that_does_not_divide_the_devices(empty_folder):
    finished = in_a_process("train", *SMALL, "--devices", 3, cwd=empty_folder)
    assert_mistake(finished, "do not divide 3 devices")
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 100_000])
def test_an_empty_or_truncated_data_file(tmp_path, empty_folder, kept):
    copy = tmp_path / "copy"
    for name in ("mtl_jax", "configs"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "run.py", copy)
    digits = copy / "mtl_jax" / "data" / "arrays" / "digits.npz"
    digits.write_bytes(digits.read_bytes()[:kept])
    finished = in_a_process("train", *SMALL, folder=copy, cwd=empty_folder)
    assert_mistake(finished, "digits.npz is missing or damaged")
    assert list(empty_folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(mistake, empty_folder):
    (empty_folder / "file").write_text("in the way")
    error = mistake("train", *SMALL, "--workdir", "file/run")
    assert "cannot write to the run folder file/run" in error
    assert "choose another --workdir" in error


@pytest.mark.parametrize("content", ['{"config": "ear', "[]", ""])
def test_a_run_folder_with_a_damaged_config(mistake, empty_folder, content):
    (empty_folder / "config.json").write_text(content)
    assert "config.json is not" in mistake("train", *SMALL, "--workdir", ".")
    assert "config.json is not" in mistake("eval", ".")


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
    def stop(*_, **__):
        raise train.StoppedError(15)

    monkeypatch.setattr(train, "train", stop)
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


def test_a_fallback_that_is_none(run_folder, mistake, empty_folder):
    continued(run_folder, empty_folder)
    arguments = ("train", *MAIN, "--workdir", "copy", "--fallback-dir")
    assert "is in the run folder copy" in mistake(*arguments, "copy/inside")
    assert "which holds a run; continue that" in mistake(*arguments, run_folder)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metrics.jsonl", '{"ste\n', "line 1 of copy/metrics.jsonl is damaged"),
        ("timings.jsonl", '{"step": 1}\n', "step 1 in timings.jsonl is damaged"),
        (
            "checkpoints/2/state/_METADATA",
            "{",
            "checkpoint copy/checkpoints/2 is damag",
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
    monkeypatch.setattr(train.loop, "make_evaluate", fail)
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
    assert not [name for name in names if name.endswith(".tmp") or name == ".writable"]
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


def test_eval_finds_the_metrics_of_the_result(finished_run, capsys):
    run_folder, trained = finished_run
    cli.main(["eval", str(run_folder)])
    evaluated = capsys.readouterr().out
    assert "checkpoint of step 4" in evaluated
    found = values(evaluated)
    assert len(found) > len(TASKS)
    assert found == values(trained.replace(str(run_folder), ""))


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
    (empty_folder / "checkpoints").symlink_to(run_folder / "checkpoints")
    error = mistake("eval", ".")
    assert len(error) < 2000
    assert " does not fit the config (" in error
    found = re.search(r": (params/\S+) is float32 \((.*?)\) in the checkpoint", error)
    assert found
    assert (
        f"{found[1]} is float32 ({found[2]}) in the checkpoint and float32 (" in error
    )
    assert re.search(r"and \d+ more differ; use the config that it was trained", error)


@pytest.mark.parametrize("damage", [os.remove, lambda file: os.truncate(file, 100)])
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


def test_eval_of_a_folder_without_a_run(mistake, empty_folder):
    assert "holds no run" in mistake("eval", ".")
    assert "holds no run" in mistake("eval", "nowhere")


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--process-id", 1), "some are missing; give all three"),
        (
            ("--coordinator", "a:1", "--num-processes", 2, "--process-id", 2),
            "process_id is 2",
        ),
        (
            ("--coordinator", "a", "--num-processes", 2, "--process-id", 1),
            "coordinator is 'a'; it must be HOST:PORT",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_processes_that_cannot_be(mistake, command, arguments, expected):
    assert expected in mistake(command, "earth_digits", *arguments)


def free_port():
    """A port that nobody listens on, and that no outgoing connection is given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def in_two_processes(*arguments, cwd):
    """Runs a command in two processes of four devices each; returns both, ended."""
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    address = ("--coordinator", f"localhost:{free_port()}", "--num-processes", "2")
    both = [
        subprocess.Popen(
            [*command, "--devices", "4", *address, "--process-id", str(i)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        output = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *text)
        for process, text in zip(both, output, strict=True)
    ]


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


def test_two_processes_make_the_same_mistake(empty_folder):
    for process in in_two_processes(
        "train", *SMALL, "--set", "mesh.expert=3", cwd=empty_folder
    ):
        assert_mistake(process, "do not divide 8 devices")
    assert list(empty_folder.iterdir()) == []
