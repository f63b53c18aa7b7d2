"""Runs on eight devices that meet records which spoil a task, or its loss."""

import dataclasses
import gc
import itertools
import json
import re
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faulty import BIG_LOSS, NAN_GRADIENT, NAN_LOSS, faulty_experiment

from mtl_jax import optim
from mtl_jax.data import training_batches
from mtl_jax.data.batch import Examples
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
from mtl_jax.train.faults import FaultReport
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


@pytest.mark.slow
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


def report(in_a_row=0, task_in_a_row=(0, 0), faulty=(False, False)):
    """What a step with two tasks tells."""
    values = dict.fromkeys(FaultReport._fields, 0.0) | {
        "in_a_row": in_a_row,
        "task_in_a_row": task_in_a_row,
        "faulty": faulty,
        "finite": True,
    }
    rows = [jnp.broadcast_to(jnp.asarray(v, jnp.float32), 2) for v in values.values()]
    return jnp.stack(rows)


def rows(step):
    array = np.full(3, step)
    return {"s": Examples(array, {}, {}, jnp.asarray(array))}


def test_a_task_at_fault_whenever_it_has_labels_stops_the_run(tmp_path):
    """Every other step has none of them, and is sound."""
    log = FaultLog(tmp_path, ["rare", "other"], {"s": ["rare", "other"]}, 3, [])
    count = 0
    for step in range(1, 9):
        faulty = step % 2 == 0
        count += faulty
        found = report(int(faulty), (count, 0), (faulty, False))
        log.follow(step, rows(step), rows(step), found)
        log.take(step)
        if step == 6:
            break
        log.check()
    with pytest.raises(
        NumericalFaultError,
        match=r"gradient of 'rare' was not finite at step 6, as in the 3 latest steps "
        r"with labels of it \(records of s: 6, 6, 6\)",
    ):
        log.check()


def test_of_many_faults_the_batch_of_the_first_that_stops_is_kept(tmp_path):
    log = FaultLog(tmp_path, ["a", "b"], {"s": ["a", "b"]}, 2, [])
    kept = {}
    for step in range(1, 60):
        batch = rows(step)
        kept[step] = weakref.ref(batch["s"])
        found = jax.block_until_ready(report(step, (step, 0), (True, False)))
        log.follow(step, batch, rows(step), found)
    del batch
    gc.collect()
    assert [step for step, reference in kept.items() if reference() is not None] == [2]
    log.take(59)
    with pytest.raises(NumericalFaultError, match="at step 2, the last of 2 faulty"):
        log.check()
    with np.load(tmp_path / "faults/2/batch_0.npz") as file:
        np.testing.assert_array_equal(file["s/input"], [2, 2, 2])


def test_a_report_is_asked_for_once_it_is_the_next(tmp_path):
    """Not all that are awaited, at every step."""
    asked = []

    @dataclasses.dataclass
    class Late:
        step: int
        ready: bool = False

        def is_ready(self):
            asked.append(self.step)
            return self.ready

        def __array__(self, dtype=None, copy=None):
            return np.asarray(report())

    log = FaultLog(tmp_path, ["a", "b"], {}, 2, [])
    reports = [Late(step) for step in range(1, 101)]
    for late in reports:
        log.follow(late.step, rows(late.step), rows(late.step), late)
    assert asked == [1] * 100
    for late in reports[:50]:
        late.ready = True
    asked.clear()
    log.follow(101, rows(101), rows(101), Late(101))
    assert asked == list(range(1, 52))
    log.take(100)
    asked.clear()
    log.follow(102, rows(102), rows(102), Late(102))
    assert asked == [101]
