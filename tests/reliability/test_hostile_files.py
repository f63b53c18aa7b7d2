"""Files of strangers: nothing in them is run, and nothing is connected to for them."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mutations
from strangers import names
from watched import outside, watched

from mtl_jax import cli
from mtl_jax.configuration import build, from_document
from mtl_jax.data import training_batches
from mtl_jax.train import RunFolderError, array_index, build_program
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.description import describe
from mtl_jax.train.integrity import write_manifest

HERE = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("modules")


@pytest.fixture(scope="module", autouse=True)
def standard_dtype_promotion():
    """Optax's schedules and its Adam mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, and what else the program did meanwhile."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    arguments = ["train", str(HERE / f"{mutations.CONFIG}:summed")]
    with watched() as events, contextlib.redirect_stdout(None):
        cli.main([*arguments, "--workdir", str(folder)])
        sockets = [
            link
            for number in os.listdir("/proc/self/fd")
            if (link := _link(f"/proc/self/fd/{number}")).startswith("socket:")
        ]
    return folder, events, sockets


def _link(path):
    try:
        return os.readlink(path)
    except OSError:
        return ""


def test_training_writes_its_folder_and_connects_to_nothing(run):
    folder, events, sockets = run
    assert {event for event, _ in events} <= {
        *("open", "os.mkdir", "os.remove", "os.rmdir", "os.rename"),
    }
    assert outside(events, folder) == []
    assert sockets == []


@pytest.fixture
def stranger(run, tmp_path):
    """A copy of that run, as it was received from somebody."""
    return Path(shutil.copytree(run[0], tmp_path / "stranger"))


def test_a_run_of_a_stranger_is_shown(stranger, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with watched() as events:
        cli.main(["show", str(stranger / "config.json"), "--seed", "7"])
    assert "seed = 7\n" in capsys.readouterr().out
    assert events == []


@pytest.mark.slow
def test_a_run_of_a_stranger_is_trained(stranger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(stranger / "config.json")
    with watched() as events:
        cli.main(["train", config, "--set", "num_steps=2"])
    # Named after the folder of the one with another length.
    assert Path("runs/stranger/result.json").is_file()
    assert json.loads(Path("runs/stranger/result.json").read_text())["num_steps"] == 2
    assert not {"pickle.find_class", "socket.connect"} & {event for event, _ in events}
    assert outside(events, tmp_path) == []


@pytest.mark.parametrize(
    ("command", "name", "expected"),
    [
        (("eval", "RUN"), "config.json", "config.json is not valid JSON (it has 1,099"),
        (("train", "RUN/config.json"), "config.json", "more than any config"),
        (("report", "RUN"), "metrics.jsonl", "metrics.jsonl, line 1: not valid JSON"),
        (("report", "RUN"), "timings.jsonl", "timings.jsonl, line 1: not valid JSON"),
    ],
)
def test_files_without_end(stranger, mistake, command, name, expected):
    (stranger / name).unlink(missing_ok=True)
    (stranger / name).touch()
    os.truncate(stranger / name, 2**40)
    error = mistake(*(part.replace("RUN", str(stranger)) for part in command))
    assert expected in error


def test_the_same_config_is_the_same_run(stranger, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    workdir = ("--workdir", str(stranger))
    cli.main(["train", str(stranger / "config.json"), *workdir])
    assert "finished run; nothing to train" in capsys.readouterr().out


def test_code_of_a_stranger_is_not_run(stranger, mistake, tmp_path):
    hostile = "raise SystemExit('ran')\n"
    for folder in (tmp_path, stranger):
        (folder / "hostile.py").write_text(hostile)
    document = json.loads((stranger / "config.json").read_text())
    for place in names(document["fiddle"]):
        if place["name"] == "Classification":
            place.update(module="hostile", name="Head")
    (stranger / "config.json").write_text(json.dumps(document))
    for command in (
        ("show", stranger / "config.json"),
        ("train", stranger / "config.json"),
        ("eval", stranger),
        ("compile", stranger / "config.json", "--topology", "v5e:2x2"),
    ):
        assert "hostile.Head, which is not in a trusted module" in mistake(*command)
    assert "hostile" not in sys.modules
    # With trust it is.
    error = mistake(
        "show", stranger / "config.json", "--trust", stranger / "hostile.py"
    )
    assert "hostile.py, line 1: SystemExit: ran" in error


@pytest.mark.parametrize(
    "config", ["../../escaped", "/tmp/escaped", "a/b", "", None, [1]]
)
def test_the_name_in_a_document_leads_nowhere(stranger, tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    file = stranger / "config.json"
    document = json.loads(file.read_text()) | {"config": config, "fields": {}}
    file.write_text(json.dumps(document))
    with watched() as events:
        cli.main(["show", str(file)])
    assert events == []
    from mtl_jax.configuration import full_name

    assert full_name(str(file)) == "stranger"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("eval", "RUN", "--step", "-1"), "has no checkpoint -1; it has [1]"),
        (("eval", "RUN", "--step", "9" * 30), f"has no checkpoint {'9' * 30}; it has"),
        (("eval", "nowhere"), "nowhere holds no run: it has no config.json"),
        (("eval", "pipe"), "pipe holds no run: it has no config.json"),
        (("eval", "x" * 300), "File name too long"),
        (("eval", "a\0b"), "a\\x00b holds no run"),
        (("eval", "piped"), "piped holds no run: it has no config.json"),
        (("export", "RUN", "--task", "<b>"), "'<b>'"),
        (("export", "RUN", "--task", "left", "--batch", "0"), "batch is 0"),
        (("extract", "RUN", "--task", "left", "--output", "x"), "experts"),
        (("report", "pipe"), "pipe is not a folder"),
        (("report", "piped"), "piped holds no result.json"),
        (("report", "RUN", "--baselines", "piped"), "piped holds no result.json"),
        (("report", "a\0b"), "is not a folder"),
        (
            ("compare", "RUN", "RUN", "--output", "no/page.html"),
            "no/page.html can't be",
        ),
        (("compare", "RUN", "RUN", "--output", "piped"), "piped can't be written"),
        (("compare", "RUN", "RUN", "--output", "x" * 300), "can't be written"),
        (("show", "piped/config.json"), "there is no such file"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_commands_about_runs_that_cannot_be(
    run, mistake, tmp_path, arguments, expected
):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "piped").mkdir()
    for name in ("config.json", "result.json"):
        os.mkfifo(tmp_path / "piped" / name)
    error = mistake(*(run[0] if a == "RUN" else a for a in arguments))
    assert expected in error


@pytest.fixture(scope="module")
def program(run):
    document = json.loads((run[0] / "config.json").read_text())
    built = build_program(build(from_document(document)))
    return built, built.fresh_state()


@pytest.fixture
def hostile(tmp_path):
    """A module that nobody must import, where it would be found."""
    (tmp_path / "hostile.py").write_text("raise SystemExit('ran')\n")
    sys.path.insert(0, str(tmp_path))
    yield
    assert "hostile" not in sys.modules


def changed(checkpoint, name, content):
    """Replaces a file of a checkpoint, which then is as whole as any."""
    (checkpoint / name).write_text(content)
    write_manifest(checkpoint)


def restored(program, run):
    """What is read of a run's checkpoint: arrays, and the position in the data."""
    program, like = program
    chosen = program.experiment
    fields = {task.name: task.field for task in chosen.tasks}
    data = training_batches(chosen.mixture, fields, chosen.seed, program.share_multiple)
    checkpoints = Checkpoints(run / "checkpoints", describe(program, None))
    try:
        step, state = checkpoints.restore_newest(lambda: like)
        checkpoints.restore_data(step, data)
    finally:
        checkpoints.close()
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.key))], (
        data.get_state()
    )


NAMED = {
    "_CHECKPOINT_METADATA": "orbax.checkpoint",
    "run/metadata": "jax.sharding",
    "state/_METADATA": "jax.Array",
    "state/_sharding": "NamedSharding",
}
"""Files of a checkpoint with names of classes, and one of these or its beginning."""


def with_other_names(checkpoint):
    """Has the checkpoint name another class wherever it names one of these."""
    for file, name in NAMED.items():
        text = (checkpoint / file).read_text()
        assert name in text
        changed(checkpoint, file, text.replace(name, "hostile.Handler"))


def test_classes_that_a_checkpoint_names_are_not_imported(
    stranger, program, run, hostile
):
    expected, position = restored(program, run[0])
    with_other_names(stranger / "checkpoints" / "1")
    with watched() as events:
        arrays, data = restored(program, stranger)
    # The only program that is run reads the index of arrays.
    started = [line for event, line in events if event == "subprocess.Popen"]
    assert len(started) == 1
    assert f"'-P', '{array_index.__file__}', " in started[0]
    others = [event for event in events if event[0] != "subprocess.Popen"]
    assert outside(others, stranger) == []
    assert data == position
    for ours, theirs in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_run_is_evaluated_whatever_classes_its_checkpoint_names(
    stranger, hostile, capsys
):
    cli.main(["eval", str(stranger)])
    expected = capsys.readouterr().out
    with_other_names(stranger / "checkpoints" / "1")
    with watched() as events:
        cli.main(["eval", str(stranger)])
    assert capsys.readouterr().out == expected
    assert not {"pickle.find_class", "socket.connect"} & {event for event, _ in events}


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000], ids=lambda c: c[:3])
@pytest.mark.parametrize("file", ["run/metadata", "data/metadata", "state/_METADATA"])
def test_documents_of_checkpoints_that_are_none(stranger, program, file, content):
    """As whole as any by its manifest, and not what a release has written."""
    changed(stranger / "checkpoints" / "1", file, content)
    with pytest.raises(RunFolderError, match=r"checkpoints/1 cannot be restored") as e:
        restored(program, stranger)
    assert "\n" not in str(e.value)


def test_a_position_in_the_data_that_cannot_be(stranger, program):
    changed(stranger / "checkpoints" / "1", "data/metadata", '{"next_index": -5}')
    with pytest.raises(RunFolderError, match=r"checkpoints/1 cannot be restored"):
        restored(program, stranger)
