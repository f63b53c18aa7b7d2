"""Signals, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Computing is one long operation to Python that lets threads run, as compilation is.
PROGRAM = """
import hashlib, sys, time
from mtl_jax.train import StoppedError, StopSignals

def compute():
    print("computing", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

with StopSignals() as signals:
    if sys.argv[1] == "compile":
        compute()
    try:
        with signals.held():
            if sys.argv[1] == "step":
                compute()
            print("training", flush=True)
            while not signals.interrupted():
                time.sleep(0.01)
            assert signals.stops_after(1) == int(sys.argv[2])
            print("saved", flush=True)
    except StoppedError as error:
        print(error)
        sys.exit(7)
"""


def run(where, number, sent):
    """Sends a signal so many times; returns the process, its output and its time."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, where, str(int(number))],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() in ("computing\n", "training\n")
            started = time.monotonic()
            for _ in range(sent):
                process.send_signal(number)
                time.sleep(0.3)
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, output, error, time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted(number):
    status, output, error, _ = run("train", number, 1)
    assert (status, error) == (7, "")
    assert output == f"saved\nstopped by {number.name}\n"


@pytest.mark.parametrize(
    ("where", "number", "sent"),
    [("compile", signal.SIGINT, 1), ("step", signal.SIGTERM, 2)],
)
def test_others_end_the_process_at_once(where, number, sent):
    status, output, error, seconds = run(where, number, sent)
    assert (status, output) == (128 + number, "")
    assert seconds < 5
    assert error == (
        f"\nended at once by {number.name}; the same command continues from the last "
        "checkpoint\n"
    )
