"""An empty folder for every command, and commands that must fail."""

import re
import sys
from pathlib import Path

import jax
import pytest

from mtl_jax import cli

sys.path.insert(0, str(Path(__file__).parent))


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
