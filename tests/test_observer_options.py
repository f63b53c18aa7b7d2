"""Options of ``train`` about who follows a run: what is refused, and before what."""

import importlib.util

import jax
import pytest

from mtl_jax import cli
from mtl_jax.cli.observers import check_profile


@pytest.fixture
def mistake(capsys, tmp_path, monkeypatch):
    """Runs a command that must fail in one line, and leave nothing behind."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["train", *arguments])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
        return error

    return run


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [
        (["--tensorboard"], "tensorboardX", "tensorboard"),
        (["--wandb", "digits"], "wandb", "wandb"),
    ],
)
def test_an_absent_package_is_named_with_its_extra(
    mistake, monkeypatch, option, package, extra
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == package else find_spec(name, *more),
    )
    # The config does not exist: this is said before anything is read.
    error = mistake("no_such_config", *option)
    assert error == (
        f"mtl-jax: error: {option[0]} needs the package {package}: "
        f"pip install 'mtl_jax[{extra}]'\n"
    )


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("7", "--profile is '7'; it must be START:STOP, such as 100:103"),
        ("-1:3", "--profile is '-1:3'; it must be START:STOP"),
        ("1:2:3", "--profile is '1:2:3'; it must be START:STOP"),
        ("0:3", "--profile is 0:3; the first step of a run is 1"),
        ("3:3", "STOP is the first that is not traced, at least 4 here"),
        ("5:3", "--profile is 5:3, which is no step"),
        ("1:99", "the run ends with step 4: STOP must be at most 5"),
    ],
)
def test_steps_that_cannot_be_traced(mistake, profile, message):
    arguments = ("earth_digits:single_digit", "--smoke", f"--profile={profile}")
    with jax.numpy_dtype_promotion("standard"):
        assert message in mistake(*arguments)


def test_an_empty_project(mistake):
    assert "--wandb is empty" in mistake("earth_digits", "--wandb", "")


def test_a_run_that_has_done_the_steps_already_goes_on_untraced(tmp_path, capsys):
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    check_profile("41:101", 100, tmp_path)
    assert capsys.readouterr().err == ""
    check_profile("40:50", 100, tmp_path)
    message = "no trace: --profile is 40:50, and the run continues from step 40\n"
    assert capsys.readouterr().err == message
    with pytest.raises(ValueError, match="STOP must be at most 101"):
        check_profile("41:102", 100, tmp_path)
    # A finished run is not trained again, whatever is asked for.
    (tmp_path / "result.json").write_text("{}")
    check_profile("40:50", 100, tmp_path)
