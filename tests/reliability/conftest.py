"""What tests of files of strangers have in common."""

import sys

import pytest

from mtl_jax import cli


@pytest.fixture
def modules(monkeypatch):
    """What a test adds to where modules are found, or imports, it takes away again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield
    for name in {"hostile", "trusted", "beside"} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def mistake(capsys, tmp_path, monkeypatch):
    """Runs a command that must fail as a user's mistake; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        assert error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run
