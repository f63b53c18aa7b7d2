"""One run in real processes: killed, stopped, and the same to the last bit."""

import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from commands import (
    CONFIG,
    Commands,
    assert_same_run,
    num_lines,
    saved_steps,
    saves_begun,
)

from mtl_jax.train import loop
from mtl_jax.train.heartbeat import HEARTBEAT


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    started = Commands(tmp_path_factory.mktemp("cache"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """Folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    command = commands.start("train", CONFIG, "--workdir", "run", folder=folder)
    assert command.wait() == 0, command.output
    assert num_lines(folder / "run") == 30
    return folder / "run"


KINDS = ("training", "saving", "starting")
"""What a process may be doing when it is killed."""

PAST_THE_START = ("training", "saving", "evaluating")


def killed_at_random(commands, arguments, folder, seed, number):
    """Kills a run so many times, each third of `KINDS` in turn, and lets it end.

    Returns:
      The run's folder, and how many kills of each kind there were in truth.
    """
    rng, run = random.Random(seed), folder / "run"
    killed = dict.fromkeys(KINDS, 0)
    seconds_to_save = 1.0

    def start():
        return commands.start("train", *arguments, "--workdir", run, folder=folder)

    for number_of_kill in range(number):
        kind, started = KINDS[number_of_kill % len(KINDS)], time.monotonic()
        command = start()
        wait_for(kind, command, run, rng, started + rng.uniform(0, seconds_to_save))
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, command.output
        if kind == "saving":
            seconds_to_save = time.monotonic() - started
        if is_saving(command, run):
            killed["saving"] += 1
        else:
            killed["training" if has_begun(command, run) else "starting"] += 1
        assert not (run / loop.RESULT).exists()
    command = start()
    assert command.wait() == 0, command.output
    return run, killed


def wait_for(kind, command, run, rng, moment):
    """Waits for a random instant at which a process probably does one of `KINDS`.

    For "starting" it is the moment given, which is to be spread over all that comes
    before the first save; that is the latest.
    """
    if kind == "starting":
        command.until(lambda: time.monotonic() >= moment or is_saving(command, run))
        return
    if kind == "saving":
        command.until(lambda: is_saving(command, run))
    else:
        command.until(lambda: has_begun(command, run))
        goal = max(saved_steps(run), default=0) + rng.randrange(1, 6)
        command.until(lambda: num_lines(run) >= goal)
    time.sleep(rng.uniform(0, 0.02))


def has_begun(command, run):
    """Whether this process of the run, and none before it, takes its steps.

    It has deleted what others left half-written, and cut the logs by then.
    """
    path = run / HEARTBEAT
    if not path.exists():
        return False
    beat = json.loads(path.read_text())
    return beat["pid"] == command.pid and beat["state"] in PAST_THE_START


def is_saving(command, run):
    """Whether a checkpoint of this process is half-written."""
    return has_begun(command, run) and bool(saves_begun(run))


def test_two_signals_and_three_kills(commands, whole, tmp_path):
    run = tmp_path / "run"

    def start():
        return commands.start("train", CONFIG, "--workdir", run, folder=tmp_path)

    # While the step is compiled there is nothing to save.
    command = start()
    command.until(lambda: "compiling" in command.output)
    sent = time.monotonic()
    command.send(signal.SIGINT)
    assert command.wait() == 128 + signal.SIGINT
    assert time.monotonic() - sent < 5
    assert "ended at once by SIGINT; the same command continues" in command.output
    assert num_lines(run) == 0

    # The step is finished and saved.
    command = start()
    command.until(lambda: num_lines(run) > 1)
    command.send(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM, and saved; the same command" in command.output
    stopped = saved_steps(run)[-1]
    assert 2 <= stopped < 30
    assert "Traceback" not in command.output

    killed_at_random(commands, [CONFIG], tmp_path, 0, 3)
    assert_same_run(run, whole)


@pytest.mark.slow
def test_fifty_kills(commands, tmp_path):
    """With an aggregator that keeps gradients, and computation in bfloat16."""
    arguments = (f"{CONFIG}:moco", "--set", "num_steps=300")
    undisturbed = tmp_path / "whole"
    command = commands.start(
        "train", *arguments, "--workdir", undisturbed, folder=tmp_path
    )
    assert command.wait() == 0, command.output
    run, killed = killed_at_random(commands, arguments, tmp_path, 1, 50)
    assert sum(killed.values()) == 50
    assert killed["saving"] >= 15, killed
    assert killed["training"] >= 8, killed
    assert killed["starting"] >= 5, killed
    assert_same_run(run, undisturbed)
