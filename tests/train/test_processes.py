"""Two processes of four devices against one of eight, and against themselves."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from one_of_several import build

from mtl_jax.data import training_batches
from mtl_jax.train import RunFolder, evaluate_run, loop, train

WORKER = Path(__file__).parent / "one_of_several.py"
ROOT = WORKER.parents[2]
NUM_STEPS, STOP = 4, 3
SECONDS = 180
"""After so long, both processes are killed. They take a tenth of it."""


def free_port():
    """A port that nobody listens on, and that no outgoing connection is given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port


def run_both(*folders):
    """Runs two processes to their end; returns their statuses and outputs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    for _ in range(3):
        coordinator = f"127.0.0.1:{free_port()}"
        both = [
            subprocess.Popen(
                [sys.executable, str(WORKER), coordinator, "2", str(i), *folders],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for i in range(2)
        ]
        deadline = time.monotonic() + SECONDS
        outputs = []
        try:
            for process in both:
                left = deadline - time.monotonic()
                outputs.append(process.communicate(timeout=max(left, 1))[0])
        finally:
            for process in both:
                # SIGTERM would only tell JAX that it is about to be pre-empted.
                process.kill()
        if "cannot listen" not in outputs[0]:
            break
    return [process.returncode for process in both], outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run of two processes and of one whose process 0 was killed."""
    parent = tmp_path_factory.mktemp("runs")
    whole, stopped = parent / "whole", parent / "stopped"
    whole.mkdir()
    stopped.mkdir()
    statuses, outputs = run_both(str(whole), f"{stopped}:{STOP}")
    assert statuses[0] == -signal.SIGKILL, outputs[0]
    # It learns of it and ends too, rather than to wait for ever.
    assert statuses[1] not in (0, -signal.SIGKILL), outputs[1]
    return whole, stopped


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The program on the eight devices of this process, and its run's folder."""
    program = build()
    folder = RunFolder(tmp_path_factory.mktemp("one"))
    train(program, folder, "small")
    return program, folder


def metrics(folder):
    lines = (folder / loop.METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_equal_one(runs, one_process):
    whole, _ = runs
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
    whole, _ = runs
    program, _ = one_process
    read = [
        [
            json.loads(line)
            for line in (whole / f"read_{i}.jsonl").read_text().splitlines()
        ]
        for i in range(2)
    ]
    chosen = program.experiment
    expected = training_batches(
        chosen.mixture,
        {task.name: task.field for task in chosen.tasks},
        chosen.seed,
        program.share_multiple,
    )
    assert len(read[0]) == len(read[1]) == NUM_STEPS
    for first, second in zip(*read, strict=True):
        batch = next(expected)
        for name, examples in batch.items():
            assert len(first[name]) == len(second[name]) == len(examples.index) / 2
            # The rows of process 0, then those of process 1, are the global batch.
            assert first[name] + second[name] == examples.index.tolist()


def test_both_continue_bit_for_bit(runs):
    whole, stopped = runs
    assert metrics(stopped)[-1]["step"] == STOP
    statuses, outputs = run_both(str(stopped))
    assert statuses == [0, 0], outputs
    expected = (whole / loop.METRICS).read_bytes()
    assert (stopped / loop.METRICS).read_bytes() == expected
    results = [json.loads((f / loop.RESULT).read_text()) for f in runs]
    assert results[0]["tasks"] == results[1]["tasks"]


def test_one_process_evaluates_what_two_have_trained(runs, one_process):
    whole, _ = runs
    program, _ = one_process
    step, tasks = evaluate_run(program, RunFolder(whole), None)
    result = json.loads((whole / loop.RESULT).read_text())
    assert step == NUM_STEPS
    for task, values in result["tasks"].items():
        for name, metric in values["metrics"].items():
            ours = tasks[task]["metrics"][name]["value"]
            np.testing.assert_allclose(ours, metric["value"], rtol=1e-5)
