"""Two processes of four devices against one of eight, and against themselves."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from one_of_several import build

from mtl_jax.data import training_batches
from mtl_jax.sharding import leaving
from mtl_jax.train import RunFolder, loop, train
from mtl_jax.train.checkpoint import Checkpoints

WORKER = Path(__file__).parent / "one_of_several.py"
ROOT = WORKER.parents[2]
NUM_STEPS = 4
SECONDS = 240
"""After so long, a process is killed. It takes a tenth of it."""


def free_port():
    """A port that nobody listens on, and that no outgoing connection is given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


@contextlib.contextmanager
def both_of(*folders, worker=WORKER):
    """Two processes."""
    coordinator = f"127.0.0.1:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, worker, coordinator, "2", str(i), *map(str, folders)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        for i in range(2)
    ]
    try:
        yield both
    finally:
        for process in both:
            # SIGTERM would only tell JAX that it is about to be pre-empted.
            process.kill()


def run_both(*folders):
    """Runs two processes to their end; returns their statuses and outputs."""
    with both_of(*folders) as both:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in both]
    return [process.returncode for process in both], outputs


def assert_lost(status, output):
    """A process learns that another one is lost, says so and ends."""
    assert status in (leaving.LOST, -signal.SIGABRT), output
    lines = [line for line in output.splitlines() if line.startswith("mtl-jax: error")]
    assert any("another" in line and "is lost" in line for line in lines), output
    assert all("the same command in all processes" in line for line in lines)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs of two processes: whole, killed and continued, pre-empted, saved
    elsewhere and continued there."""
    parent = tmp_path_factory.mktemp("runs")
    whole, killed, stopped = (parent / name for name in ("whole", "killed", "stopped"))
    failed, elsewhere = parent / "failed", parent / "failed_elsewhere"
    for folder in (whole, killed, stopped, failed):
        folder.mkdir()
    statuses, outputs = run_both(whole, f"{killed}:kill:3")
    assert statuses[0] == -signal.SIGKILL, outputs[0]
    assert_lost(statuses[1], outputs[1])
    assert [line["step"] for line in metrics(killed)] == [1, 2, 3]
    statuses, outputs = run_both(
        killed, f"{failed}:full:1", elsewhere, f"{stopped}:interrupt:1"
    )
    assert statuses == [0, 0], outputs
    told = f"No space left on device; all is saved at step 2 in {elsewhere}; to"
    assert all(told in output for output in outputs), outputs
    assert "stopped by SIGTERM in" in outputs[0]
    assert "stopped by SIGINT in" in outputs[1]
    return whole, killed, stopped, elsewhere


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The program on the eight devices of this process, and its run's folder."""
    program = build()
    folder = RunFolder(tmp_path_factory.mktemp("one"))
    train(program, folder, "small")
    return program, folder


def batches_of(program):
    chosen = program.experiment
    fields = {task.name: task.field for task in chosen.tasks}
    return training_batches(chosen.mixture, fields, chosen.seed, program.share_multiple)


def metrics(folder):
    lines = (folder / loop.METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_equal_one(runs, one_process):
    whole = runs[0]
    _, folder = one_process
    ours, theirs = metrics(whole), metrics(folder.path)
    assert [line["step"] for line in ours] == [*range(1, NUM_STEPS + 1)]
    for two, one in zip(ours, theirs, strict=True):
        assert two.keys() == one.keys()
        for name, value in one.items():
            np.testing.assert_allclose(
                np.array(two[name], float),
                np.array(value, float),
                rtol=1e-5,
                atol=1e-6,
                err_msg=f"step {one['step']}, {name}",
            )
    two, one = (np.load(f / "samples.npz") for f in (whole, folder.path))
    assert two.files == one.files
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5)


def test_each_example_is_read_by_one_process_and_none_is_lost(runs, one_process):
    whole = runs[0]
    program, _ = one_process
    read = [
        [
            json.loads(line)
            for line in (whole / f"read_{i}.jsonl").read_text().splitlines()
        ]
        for i in range(2)
    ]
    # An epoch: every record once.
    both = [index for steps in read for step in steps for index in step["tiles"]]
    assert sorted(both) == [*range(64)]
    expected = batches_of(program)
    assert len(read[0]) == len(read[1]) == NUM_STEPS
    for first, second in zip(*read, strict=True):
        batch = next(expected)
        for name, examples in batch.items():
            assert len(first[name]) == len(second[name]) == len(examples.index) / 2
            # The rows of process 0, then those of process 1, are the global batch.
            assert first[name] + second[name] == examples.index.tolist()


def test_both_continue_bit_for_bit(runs):
    whole, killed, _, elsewhere = runs
    expected = (whole / loop.METRICS).read_bytes()
    assert (killed / loop.METRICS).read_bytes() == expected
    assert (elsewhere / loop.METRICS).read_bytes() == expected
    results = [json.loads((f / loop.RESULT).read_text()) for f in (whole, killed)]
    assert results[0]["tasks"] == results[1]["tasks"]


def test_both_save_and_stop_when_one_is_interrupted(runs):
    whole, _, stopped, _ = runs
    last = metrics(stopped)[-1]["step"]
    assert (stopped / loop.CHECKPOINTS / str(last)).is_dir()
    assert not (stopped / loop.RESULT).exists()
    # As far as both go, they are the same, but for the last evaluation: of all records.
    text, expected = ((f / loop.METRICS).read_text() for f in (stopped, whole))
    number = min(last, NUM_STEPS - 1)
    assert text.splitlines()[:number] == expected.splitlines()[:number]


def test_one_process_restores_what_two_have_saved(runs, one_process):
    program, folder = one_process
    like, params = program.fresh_state(), []
    for path in (runs[0], folder.path):
        checkpoints = Checkpoints(path / loop.CHECKPOINTS, read_only=True)
        params.append(checkpoints.restore_state(NUM_STEPS, like).params)
        batches = batches_of(program)
        checkpoints.restore_data(NUM_STEPS, batches)
        checkpoints.close()
        assert batches.get_state() == {"next_index": NUM_STEPS}
    # Where a gradient is 0, such as that of a key's bias, Adam makes steps of rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), *params)


@pytest.mark.slow
@pytest.mark.parametrize(("event", "victim"), [("kill", 0), ("kill_last", 1)])
def test_a_process_ends_within_a_minute_of_another(runs, tmp_path, event, victim):
    with both_of(f"{tmp_path}:{event}:3") as both:
        assert both[victim].wait(SECONDS) == -signal.SIGKILL
        killed = time.monotonic()
        output, _ = both[1 - victim].communicate(timeout=SECONDS)
        assert time.monotonic() - killed < 60
        both[victim].communicate()
    assert_lost(both[1 - victim].returncode, output)
    statuses, outputs = run_both(tmp_path)
    assert statuses == [0, 0], outputs
    assert (tmp_path / loop.METRICS).read_bytes() == (
        runs[0] / loop.METRICS
    ).read_bytes()
