"""Runs on eight devices that meet records which spoil a task, or its loss."""

import dataclasses
import itertools
import json
import re
import signal

import jax
import numpy as np
import pytest
from faulty import BIG_LOSS, NAN_GRADIENT, NAN_LOSS, faulty_experiment

from mtl_jax import optim
from mtl_jax.data import training_batches
from mtl_jax.train import (
    NumericalFaultError,
    RunFolder,
    RunFolderError,
    StoppedError,
    StopSignals,
    build_program,
    faults,
    loop,
    train,
)
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.description import describe
from mtl_jax.train.fault_log import FaultLog
from mtl_jax.train.program import Program

STEPS = 20
SPOILT = {5: NAN_LOSS, 40: NAN_GRADIENT}
HIGH = 17


@pytest.fixture(scope="module")
def program():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "FEWEST", 4)
        trouble = (*SPOILT.items(), (HIGH, BIG_LOSS))
        built = build_program(
            faulty_experiment(
                trouble=trouble,
                aggregator=optim.pcgrad,
                num_steps=STEPS,
                log_every=4,
                evaluate_every=STEPS,
                checkpoint_every=8,
            )
        )
        assert built.mesh.size == 8
        # Every run here compiles the same.
        step, evaluate = built.compile_step(), loop.make_evaluate(built)
        patch.setattr(Program, "compile_step", lambda self: step)
        patch.setattr(loop, "make_evaluate", lambda self: evaluate)
        yield built


@pytest.fixture(scope="module")
def batches(program):
    chosen = program.experiment
    fields = {task.name: task.field for task in chosen.tasks}
    stream = training_batches(chosen.mixture, fields, 0, program.share_multiple)
    return dict(enumerate(itertools.islice(stream, STEPS), start=1))


@pytest.fixture(scope="module")
def whole(program, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("whole"))
    train(program, folder, "faulty")
    return folder


def lines(folder, name):
    return [json.loads(line) for line in (folder.path / name).read_text().splitlines()]


def with_any(batches, records):
    """Steps whose batch has any of these tiles."""
    return [s for s, b in batches.items() if set(b["tiles"].index) & set(records)]


def test_lines_count_the_faults_since_the_line_before(whole, batches):
    faulty = with_any(batches, SPOILT)
    # Both of them in several stretches, or the test would show little.
    assert len(faulty) >= 4
    found = lines(whole, loop.METRICS)
    assert [line["step"] for line in found] == [4, 8, 12, 16, 20]
    for line in found:
        since = range(line["step"] - 3, line["step"] + 1)
        assert line["redness/left_out"] == len(set(since) & set(faulty))
        assert line["phase/left_out"] == line["all/skipped_steps"] == 0
        assert line["all/parameter_norm"] is not None


def test_spikes_name_the_records(whole, batches):
    found = lines(whole, loop.SPIKES)
    first = next(s for s in with_any(batches, [HIGH]) if s > 6)
    spike = next(line for line in found if line["step"] == first)
    assert spike["task"] == "redness"
    assert spike["loss"] > spike["limit"] > spike["mean"]
    assert spike["records"] == {"tiles": batches[first]["tiles"].index.tolist()}


def final_state(program, folder):
    checkpoints = Checkpoints(
        folder.path / loop.CHECKPOINTS, describe(program, None), read_only=True
    )
    state = checkpoints.restore_state(STEPS, program.fresh_state())
    checkpoints.close()
    return jax.tree.map(
        lambda leaf: (
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        ),
        state,
    )


def test_an_interruption_changes_no_count(
    program, whole, batches, tmp_path, monkeypatch
):
    """Stopped between two lines, where the next tells of both parts of the run."""
    stop, faulty = 14, with_any(batches, SPOILT)
    assert {13, 15} <= set(faulty)
    assert stop in with_any(batches, [HIGH])
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            StopSignals,
            "stops_after",
            lambda self, step: signal.SIGTERM if step == stop else None,
        )
        with pytest.raises(StoppedError):
            train(program, folder, "faulty")
    train(program, folder, "faulty")
    for name in (loop.METRICS, loop.SPIKES):
        assert (tmp_path / name).read_bytes() == (whole.path / name).read_bytes()
    jax.tree.map(
        np.testing.assert_array_equal,
        final_state(program, folder),
        final_state(program, whole),
    )


@pytest.mark.parametrize("value", ["x", 0.5, [1], {"a": 1}])
def test_a_damaged_line_of_metrics_is_named(tmp_path, value):
    lines = [{"step": 1, "phase/left_out": None}, {"step": 4, "phase/left_out": value}]
    with pytest.raises(RunFolderError, match=r"step 4 in metrics\.jsonl is damaged"):
        FaultLog(tmp_path, ["phase"], {}, 1, lines)


def test_too_many_faults_stop_the_run(program, batches, tmp_path):
    chosen = dataclasses.replace(program.experiment, max_faulty_steps=1)
    impatient = dataclasses.replace(program, experiment=chosen)
    folder = RunFolder(tmp_path)
    step = with_any(batches, SPOILT)[0]
    with pytest.raises(
        NumericalFaultError,
        match=rf"gradient of 'redness' was not finite at step {step} "
        rf"\(records of tiles: [0-9, ]+\); its batch is in {re.escape(str(tmp_path))}",
    ) as caught:
        train(impatient, folder, "faulty")
    where = caught.value.reproducer
    document = json.loads((where / "fault.json").read_text())
    assert document["step"] == step
    assert document["tasks"] == ["redness"]
    assert document["records"] == {"tiles": batches[step]["tiles"].index.tolist()}
    with np.load(where / "batch_0.npz", allow_pickle=False) as file:
        saved = dict(file)
    for source, examples in batches[step].items():
        np.testing.assert_array_equal(saved[f"{source}/input"], examples.inputs)
        for task, target in examples.targets.items():
            np.testing.assert_array_equal(saved[f"{source}/{task}/target"], target)
    # The run can go there again from the checkpoint before.
    kept = [int(path.name) for path in (tmp_path / loop.CHECKPOINTS).glob("[0-9]*")]
    assert all(checkpoint < step for checkpoint in kept)
