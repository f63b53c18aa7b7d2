"""One run in real processes: killed, stopped, and the same to the last bit."""

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


def killed_at_random(commands, arguments, folder, seed, number):
    """Kills a run so many times, half of them inside a save, and lets it end.

    Returns:
      The run's folder, and how many kills left a checkpoint half-written.
    """
    rng, run, inside = random.Random(seed), folder / "run", 0

    def start():
        return commands.start("train", *arguments, "--workdir", run, folder=folder)

    for kill in range(number):
        command = start()
        if kill % 2:
            command.until(lambda: saves_begun(run))
            time.sleep(rng.uniform(0, 0.05))
        else:
            goal = max(saved_steps(run), default=0) + rng.randrange(1, 6)
            command.until(lambda goal=goal: num_lines(run) >= goal)
            time.sleep(rng.uniform(0, 0.1))
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, command.output
        inside += bool(saves_begun(run))
        assert not (run / loop.RESULT).exists()
    command = start()
    assert command.wait() == 0, command.output
    return run, inside


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
    run, inside = killed_at_random(commands, arguments, tmp_path, 1, 50)
    assert inside > 5
    assert_same_run(run, undisturbed)
