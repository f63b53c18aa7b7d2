"""Links in a stranger's run folder, which would lead what a run writes elsewhere."""

import os
import shutil
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mutations

from mtl_jax import cli
from mtl_jax.train import RunFolderError, integrity
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.fault_log import FaultLog
from mtl_jax.train.integrity import (
    DamagedCheckpointError,
    check_files,
    checked_text,
    write_manifest,
)
from mtl_jax.train.profile import Profile
from mtl_jax.train.start_from import start_from
from mtl_jax.train.tensorboard import TensorBoard

HERE = Path(__file__).parent
WRITERS = {
    "faults": lambda run: FaultLog(run, ["left"], {}, 1, []),
    "profile": lambda run: Profile(run / "profile", 1, 2),
    "tensorboard": lambda run: TensorBoard(run / "tensorboard", ["left"]),
}


@pytest.mark.parametrize("inside", ["", "plugins", "57/batch_0.npz"])
@pytest.mark.parametrize("name", WRITERS)
def test_folders_that_are_links_or_hold_some_are_refused(tmp_path, name, inside):
    run, link = tmp_path / "run", tmp_path / "run" / name / inside
    link.parent.mkdir(parents=True)
    WRITERS[name](run)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError) as error:
        WRITERS[name](run)
    assert str(error.value) == (
        f"{link} is a symbolic link, through which nothing is written; put the folder "
        "or file itself there, or delete the link"
    )


def test_what_a_link_leads_to_is_not_looked_through(tmp_path, monkeypatch):
    (tmp_path / "faults").symlink_to("/")
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("looks"))
    with pytest.raises(RunFolderError, match="faults is a symbolic link"):
        WRITERS["faults"](tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tensorboard", ["--tensorboard"]),
        ("profile", ["--profile", "1:2"]),
        ("faults", []),
        ("checkpoints", []),
    ],
)
def test_a_run_does_not_begin_to_write_through_them(
    tmp_path, monkeypatch, capsys, name, options
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / mutations.CONFIG, tmp_path)
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    run.mkdir()
    (run / name).symlink_to(elsewhere)
    command = ["train", f"{mutations.CONFIG}:summed", "--workdir", str(run), *options]
    with pytest.raises(SystemExit) as exit_, jax.numpy_dtype_promotion("standard"):
        cli.main(command)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mtl-jax: error: {run / name} is a symbolic link, through")
    assert error.count("\n") == 1
    assert not any(elsewhere.iterdir())


READERS = {
    "train": lambda run: Checkpoints(run / "checkpoints"),
    "read": lambda run: Checkpoints(run / "checkpoints", read_only=True),
    "start": lambda run: start_from({}, run=str(run), make=lambda new, old: old),
}


@pytest.mark.parametrize("inside", ["", "3", "3.orbax-checkpoint-tmp", ".writable"])
@pytest.mark.parametrize("name", READERS)
def test_checkpoints_that_are_links_are_refused(tmp_path, name, inside):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run, elsewhere / "3"):
        folder.mkdir(parents=True)
    (elsewhere / "3" / "kept").touch()
    link = run / "checkpoints" / inside
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere / inside)
    with pytest.raises(RunFolderError) as error:
        READERS[name](run)
    assert str(error.value).startswith(f"{link} is a symbolic link, through which")
    assert [path.name for path in elsewhere.rglob("*")] == ["3", "kept"]


def test_files_of_a_checkpoint_may_be_links_and_its_folders_not(tmp_path):
    """A cache keeps a file once that several folders hold; SHA-256 tell what it is."""
    cached, checkpoint = tmp_path / "cached", tmp_path / "3"
    checkpoint.mkdir()
    cached.write_text("content")
    (checkpoint / "state").symlink_to(cached)
    write_manifest(checkpoint)
    assert check_files(checkpoint) == {}
    cached.write_text("another")
    with pytest.raises(RunFolderError, match="state has another content"):
        check_files(checkpoint)


@pytest.mark.parametrize("name", ["state", ".state", ".hidden/state"])
@pytest.mark.parametrize("make", ["folder", "nothing", "pipe", "device"])
def test_what_else_a_checkpoint_holds_is_not_opened(tmp_path, make, name):
    checkpoint, inside = tmp_path / "3", tmp_path / "3" / name
    inside.parent.mkdir(parents=True)
    write_manifest(checkpoint)
    if make == "pipe":
        os.mkfifo(inside)
    else:
        leads = {"folder": tmp_path, "nothing": "nowhere", "device": "/dev/zero"}
        inside.symlink_to(leads[make])
    with pytest.raises(RunFolderError, match=f"{name} is neither a file nor a folder"):
        check_files(checkpoint)


ENDLESS = {
    "sparse": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", ["manifest.json", "run/metadata"])
@pytest.mark.parametrize("make", ENDLESS)
def test_documents_of_a_checkpoint_without_end(tmp_path, make, name):
    """What is read before all files are checked."""
    checkpoint = tmp_path / "3"
    (checkpoint / "run").mkdir(parents=True)
    (checkpoint / "run" / "metadata").write_text("{}")
    write_manifest(checkpoint)
    assert checked_text(checkpoint, "run/metadata") == "{}"
    (checkpoint / name).unlink()
    ENDLESS[make](checkpoint / name)
    expected = r"has 1,099,511,627,776 bytes" if make == "sparse" else "is no ordinary"
    with pytest.raises(DamagedCheckpointError, match=rf"\({name}: it {expected}"):
        checked_text(checkpoint, "run/metadata")


def test_only_files_with_arrays_are_large(tmp_path, monkeypatch):
    arrays, document = tmp_path / "state" / "d" / "a", tmp_path / "state" / "_METADATA"
    arrays.parent.mkdir(parents=True)
    for path in (arrays, document):
        path.write_bytes(bytes(11))
    write_manifest(tmp_path)
    monkeypatch.setattr(integrity, "MOST_BYTES", 10)
    with pytest.raises(DamagedCheckpointError, match="_METADATA has 11 bytes, more"):
        check_files(tmp_path)
    document.unlink()
    write_manifest(tmp_path)
    check_files(tmp_path)
