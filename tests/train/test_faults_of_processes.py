"""Faults that two processes of four devices meet, against one of eight."""

import json

import faulty_of_several
import numpy as np
import pytest
from faulty_of_several import run_both
from test_processes import SECONDS, both_of

from mtl_jax.train import faults, loop
from mtl_jax.train.program import Program

WORKER = faulty_of_several.__file__


def in_two_processes(folder):
    """What each of two processes prints at last."""
    with both_of(folder, worker=WORKER) as both:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return [output.splitlines()[-1] for output in outputs]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_name_the_records_that_one_names(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "FEWEST", faults.FEWEST)
    monkeypatch.setattr(Program, "compile_step", Program.compile_step)
    monkeypatch.setattr(loop, "make_evaluate", loop.make_evaluate)
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run_both(one)
    both = in_two_processes(two)

    # Both say the same, and what a single process says.
    assert both[0] == both[1]
    assert both[0].replace(str(two), str(one)) == alone

    ours, theirs = (lines(path / "whole" / "spikes.jsonl") for path in (two, one))
    assert len(theirs) >= 1
    for mine, yours in zip(ours, theirs, strict=True):
        assert {k: mine[k] for k in ("step", "task", "records")} == {
            k: yours[k] for k in ("step", "task", "records")
        }
        np.testing.assert_allclose(mine["loss"], yours["loss"], rtol=1e-4)
    for mine, yours in zip(
        *(lines(path / "whole" / loop.METRICS) for path in (two, one)), strict=True
    ):
        assert mine["redness/left_out"] == yours["redness/left_out"]

    (mine,), (yours,) = ((path / "stopped" / "faults").iterdir() for path in (two, one))
    assert mine.name == yours.name
    documents = [
        json.loads((path / "fault.json").read_text()) for path in (mine, yours)
    ]
    assert documents[0]["records"] == documents[1]["records"]
    assert documents[0]["tasks"] == documents[1]["tasks"] == ["redness"]
    with (
        np.load(mine / "batch_0.npz") as first,
        np.load(mine / "batch_1.npz") as second,
        np.load(yours / "batch_0.npz") as whole,
    ):
        assert first.files == second.files == whole.files
        for name in whole.files:
            # The rows of the first process, then those of the second.
            rows = np.concatenate([first[name], second[name]])
            np.testing.assert_array_equal(rows, whole[name])
