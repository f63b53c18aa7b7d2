"""Processes that may write no large files, or none, fail in the middle of a run."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from commands import CONFIG, HERE, ROOT, assert_same_run, num_lines, saved_steps
from test_processes import SECONDS, free_port

from mtl_jax.train import loop

STARVED = """
import resource
import signal
import sys

from mtl_jax.cli import main

limit = int(sys.argv.pop(1))
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main(sys.argv[1:])
"""
# Logs and documents are smaller, the file with the arrays is larger.
LIMIT = 2**18


def train(folder, limit, *options):
    """Runs in a process of its own; returns its status and its errors."""
    arguments = ["train", CONFIG, "--workdir", folder, "--set", "trunk.width=64"]
    done = subprocess.run(
        [sys.executable, "-c", STARVED, str(limit), *arguments, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_save_that_fails_half_written_is_told_and_made_up_for(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    elsewhere = tmp_path / "elsewhere"
    status, error = train(ours, LIMIT)
    assert status == 2
    told = f"mtl-jax: error: cannot write to the run folder {ours} any more: "
    line = error.splitlines()[-1]
    assert line.startswith(told)
    assert "File too large" in line
    assert "the same command continues from the last checkpoint" in line
    assert "Traceback" not in error
    assert saved_steps(ours) == []
    assert num_lines(ours) >= 4

    # Elsewhere there is no more room.
    status, error = train(ours, LIMIT, "--fallback-dir", elsewhere)
    assert status == 2
    assert f"nor could it be saved in {elsewhere}: " in error.splitlines()[-1]
    assert "Traceback" not in error

    for folder in (ours, theirs):
        status, error = train(folder, 0)
        assert status == 0, error
    assert_same_run(ours, theirs)


def train_two(folder, *faults, options=()):
    """Runs two processes, each with a fault of its own; returns statuses and errors."""
    coordinator = f"127.0.0.1:{free_port()}"
    several = ["--coordinator", coordinator, "--num-processes", "2", "--process-id"]
    small = ["--set", "trunk.width=64", "--set", "num_steps=14"]
    arguments = ["train", CONFIG, "--workdir", folder, *small, *options, *several]
    both = [
        subprocess.Popen(
            [sys.executable, HERE / "failing_disk.py", fault, *arguments, str(i)],
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "JAX_NUM_CPU_DEVICES": "4",
                "TF_CPP_MIN_LOG_LEVEL": "2",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, fault in enumerate(faults)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in both]
    finally:
        for process in both:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return [process.returncode for process in both], errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    statuses, errors = train_two(folder, "none", "none")
    assert statuses == [0, 0], errors
    return folder


def told(errors):
    """What both processes say last, which is the same and no traceback."""
    assert all("Traceback" not in error for error in errors), errors
    lines = {error.splitlines()[-1] for error in errors}
    (line,) = lines
    assert all(error.count("mtl-jax: error") == 1 for error in errors), errors
    return line


# Checkpoints are written at steps 4, 8, 12 and 14.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "reason", "steps"),
    [
        # Process 0 cannot write a log.
        (("full:6", "none"), "File too large", [8]),
        (("full_and_stopped:4", "none"), "File too large", [4, 5, 6, 7, 8]),
        (("no_checkpoints:6", "none"), "Not a directory", [8]),
        # A save fails in one process, in the background.
        (("large:5", "none"), "File too large", [12]),
        (("none", "large:5"), "File too large", [12]),
        (("none", "large:13"), "File too large", [14]),
    ],
)
def test_two_processes_save_a_run_elsewhere(whole, tmp_path, faults, reason, steps):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    options = ["--fallback-dir", elsewhere]
    statuses, errors = train_two(folder, *faults, options=options)
    assert statuses == [2, 2], errors
    found = re.fullmatch(
        rf"mtl-jax: error: cannot write to the run folder {folder} any more: "
        rf"{reason}; all is saved at step (\d+) in {elsewhere}; to continue, give the "
        rf"same command --workdir {elsewhere}, and no or another --fallback-dir",
        told(errors),
    )
    assert found, errors
    assert int(found[1]) in steps
    assert saved_steps(elsewhere) == [int(found[1])]
    assert num_lines(elsewhere) == int(found[1])

    statuses, errors = train_two(elsewhere, "none", "none")
    assert statuses == [0, 0], errors
    assert_same_run(elsewhere, whole)


@pytest.mark.slow
def test_two_processes_say_that_a_run_is_saved_nowhere(whole, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for options, end in (
        (
            ["--fallback-dir", elsewhere],
            f"nor could it be saved in {elsewhere}: File too large; the same command "
            "continues from the last checkpoint once that is mended",
        ),
        (
            [],
            "stopped at step 12: the same command continues from the last checkpoint "
            "once that is mended (with --fallback-dir DIR all would have been saved "
            "there)",
        ),
    ):
        statuses, errors = train_two(folder, "none", "everywhere:5", options=options)
        assert statuses == [2, 2], errors
        line = told(errors)
        assert line.startswith("mtl-jax: error: cannot write to the run folder")
        assert line.endswith(end)
    assert not (elsewhere / "config.json").exists()
    assert saved_steps(folder) == [4]

    statuses, errors = train_two(folder, "none", "none")
    assert statuses == [0, 0], errors
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_two_processes_say_that_results_cannot_be_written(whole, tmp_path):
    statuses, errors = train_two(tmp_path, "results", "none")
    assert statuses == [2, 2], errors
    assert told(errors) == (
        f"mtl-jax: error: cannot write to the run folder {tmp_path} any more: File too "
        "large; training is finished and saved: the same command writes its results "
        "once that is mended"
    )
    statuses, errors = train_two(tmp_path, "none", "none")
    assert statuses == [0, 0], errors
    assert_same_run(tmp_path, whole)
    ours, theirs = (
        json.loads((folder / loop.RESULT).read_text()) for folder in (tmp_path, whole)
    )
    assert ours["tasks"] == theirs["tasks"]
