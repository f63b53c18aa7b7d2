"""A process that may write no large files fails in the middle of a save."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import CONFIG, ROOT, assert_same_run, num_lines, saved_steps

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
