"""Commands that something stops: Ctrl-C, another command, numerical faults."""

import fcntl
import socket
import sys

import pytest

from mtl_jax import cli, configuration, train

SMALL = ("earth_digits:single_digit", "--smoke")


def test_ctrl_c_before_there_is_anything_to_save(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(configuration, "load_config", interrupted)
    for command in ("train", "show"):
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, *SMALL])
        assert exit_.value.code == 130
        assert capsys.readouterr().err == "mtl-jax: error: interrupted\n"


def test_a_run_that_another_command_trains(mistake, empty_folder):
    (empty_folder / "run").mkdir()
    with (empty_folder / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"4711 {socket.gethostname()}\n")
        file.flush()
        error = mistake("train", *SMALL, "--workdir", "run")
    assert "run is being trained by another command (process 4711 of " in error


def test_the_command_that_looks_for_the_first_nan_is_of_one_process(
    empty_folder, monkeypatch, capsys
):
    def fault(*_, **__):
        raise train.NumericalFaultError("not finite", empty_folder)

    monkeypatch.setattr(train, "train", fault)
    of_several = ("--coordinator=a:1", "--num-proc", "2", "--process-id", "1")
    given = ["train", *of_several, *SMALL, "--distributed", "--set", "seed=2"]
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *SMALL])
    assert exit_.value.code == 3
    command = (
        "mtl-jax train earth_digits:single_digit --smoke --set seed=2 --debug-nans"
    )
    assert (empty_folder / "command.txt").read_text() == f"{command}\n"
    assert capsys.readouterr().err.endswith(f"names the operation: {command}\n")
