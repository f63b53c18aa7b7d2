"""Links in a stranger's run folder, which would lead what a run writes elsewhere."""

import shutil
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mutations

from mtl_jax import cli
from mtl_jax.train import RunFolderError
from mtl_jax.train.fault_log import FaultLog
from mtl_jax.train.profile import Profile
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
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("looks"))
    with pytest.raises(RunFolderError, match="faults is a symbolic link"):
        WRITERS["faults"](tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tensorboard", ["--tensorboard"]),
        ("profile", ["--profile", "1:2"]),
        ("faults", []),
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
