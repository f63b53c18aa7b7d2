"""Runs that signals stop and whose folders fail, in this process."""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import time

import jax
import pytest
from same_run import assert_same_run, timing_lines
from small import Tiles, experiment

from mtl_jax import optim
from mtl_jax.data import Component, Mixture
from mtl_jax.train import (
    Fallback,
    MeshShape,
    RunFolder,
    RunFolderError,
    StoppedError,
    build_program,
    check_fallback,
    loop,
    train,
)
from mtl_jax.train.program import Program


def once(make):
    """Remembers what is made of a program."""
    made = {}

    def remembered(program):
        if id(program) not in made:
            made[id(program)] = program, make(program)
        return made[id(program)][1]

    return remembered


def build(aggregator, dtype="float32"):
    """Checkpoints are written at steps 2, 4 and 6; evaluations are at 3 and 6."""
    labels = ("bright", "redness")
    tasks = tuple(task for task in experiment().tasks if task.name in labels)
    tiles = Component(Tiles(), Tiles(40, 2), labels)
    chosen = experiment(
        tasks=tasks,
        mixture=Mixture({"tiles": tiles}, batch_size=16),
        num_experts=0,
        mesh=MeshShape(),
        aggregator=aggregator,
        evaluation_batch_size=8,
    )
    trunk = chosen.trunk.clone(dtype=dtype)
    return build_program(dataclasses.replace(chosen, trunk=trunk), jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """All runs of a program share what is compiled."""
    states = once(Program.init_state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile_step", once(Program.compile_step))
        patch.setattr(loop, "make_evaluate", once(loop.make_evaluate))
        patch.setattr(loop, "collect_samples", lambda *_: {})
        for name in ("init_state", "fresh_state"):
            patch.setattr(
                Program,
                name,
                lambda self: jax.tree.map(lambda leaf: leaf.copy(), states(self)),
            )
        yield


@pytest.fixture(scope="module")
def program():
    return build(optim.moco)


@pytest.fixture(scope="module")
def whole(program, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("whole"))
    return folder, train(program, folder, "small")


class StopWhileEvaluating:
    """Signals that come when an evaluation is about to take its ``number``-th batch."""

    def __init__(self, number):
        self.left = number

    @contextlib.contextmanager
    def held(self):
        yield
        if self.left < 0:
            raise StoppedError(signal.SIGTERM)

    def interrupted(self):
        self.left -= 1
        return self.left < 0

    def stops_after(self, step):
        return signal.SIGTERM if self.left < 0 else None


# Each evaluation takes five batches.
@pytest.mark.parametrize(("numbers", "step"), [((2, 0, 1), 3), ((7, 3), 6)])
def test_an_evaluation_cut_short_is_made_up_for(
    program, whole, tmp_path, numbers, step
):
    folder = RunFolder(tmp_path)
    for number in numbers:
        signals = StopWhileEvaluating(number)
        with pytest.raises(StoppedError, match="stopped by SIGTERM"):
            train(program, folder, "small", signals=signals)
        assert [line["step"] for line in timing_lines(folder)] == [*range(1, step)]
        assert (tmp_path / loop.CHECKPOINTS / str(step)).is_dir()
        assert folder.read_json(loop.RESULT) is None
    result = train(program, folder, "small")
    assert_same_run(program, folder, whole[0])
    assert result["tasks"] == whole[1]["tasks"]
    assert [line["step"] for line in timing_lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / loop.UNEVALUATED).exists()


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"step": 3}',
        '{"step": 3, "metrics": 1, "timing": {"step": 3}}',
        '{"step": 3, "metrics": {}, "timing": []}',
        '{"step": 3, "metrics": {}, "timing": {"step": 2}}',
    ],
)
def test_a_damaged_note_of_an_evaluation_is_named(program, tmp_path, content):
    (tmp_path / loop.UNEVALUATED).write_text(content)
    with pytest.raises(RunFolderError, match=r"unevaluated\.json is damaged"):
        train(program, RunFolder(tmp_path), "small")


class At:
    """Does something to a run when a step has been logged."""

    def __init__(self, step, event):
        self.step, self.event = step, event

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def begin(self, step):
        pass

    def phase(self, step, name):
        pass

    def update(self, step, *arguments, **keywords):
        if step == self.step:
            self.event()


def full_disk(folder, patch):
    """From now on, half a line fits in a log of the folder."""
    append = RunFolder.append

    def half(self, name, line):
        if self.path != folder.path:
            return append(self, name, line)
        with (self.path / name).open("a") as file:
            file.write('{"step": 1')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(RunFolder, "append", half)


def no_room_for_checkpoints(folder):
    """Puts a file where their folder was."""
    shutil.rmtree(folder.path / loop.CHECKPOINTS)
    (folder.path / loop.CHECKPOINTS).write_text("in the way")


def move_away(folder, path):
    """Moves a run's folder once nothing is being saved there."""
    deadline = time.monotonic() + 60
    while not (folder.path / loop.CHECKPOINTS / "2").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    folder.path.rename(path)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_whose_disk_is_full_is_saved_elsewhere(
    program, whole, tmp_path, monkeypatch, step
):
    """Lines of steps 3 and 5: that of 5 is written while 6, the last, computes."""
    folder, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    event = At(step, lambda: full_disk(folder, monkeypatch))
    fallback = Fallback(elsewhere, {"config": "small"})
    saved = {2: 3, 4: 6}[step]
    with pytest.raises(RunFolderError) as error:
        train(program, folder, "small", [event], fallback=fallback)
    assert str(error.value).startswith(
        f"cannot write to the run folder {folder.path} any more: No space left on "
        f"device; all is saved at step {saved} in {elsewhere}; to continue"
    )
    copy = RunFolder(elsewhere)
    assert copy.read_json("config.json") == {"config": "small"}
    train(program, copy, "small")
    assert_same_run(program, copy, whole[0])


def test_a_run_whose_checkpoints_fail_is_saved_elsewhere(program, whole, tmp_path):
    folder, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    event = At(1, lambda: no_room_for_checkpoints(folder))
    fallback = Fallback(elsewhere, {"config": "small"})
    with pytest.raises(RunFolderError, match=r"all is saved at step [234]"):
        train(program, folder, "small", [event], fallback=fallback)
    copy = RunFolder(elsewhere)
    train(program, copy, "small")
    assert_same_run(program, copy, whole[0])


def test_a_run_whose_folder_is_removed_is_saved_elsewhere(program, whole, tmp_path):
    folder, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    event = At(3, lambda: move_away(folder, tmp_path / "moved"))
    fallback = Fallback(elsewhere, {"config": "small"})
    lost = r"step 4 in .*, but for metrics.jsonl and timings.jsonl, which could not be"
    with pytest.raises(RunFolderError, match=lost):
        train(program, folder, "small", [event], fallback=fallback)
    assert not folder.path.exists()
    copy = RunFolder(elsewhere)
    train(program, copy, "small")
    expected = (whole[0].path / loop.METRICS).read_text().splitlines()
    assert (elsewhere / loop.METRICS).read_text().splitlines() == expected[3:]


def test_a_full_disk_without_a_place_elsewhere(program, whole, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        event = At(4, lambda: full_disk(folder, patch))
        advice = r"No space left .* stopped at step 6: .* \(with --fallback-dir DIR all"
        with pytest.raises(RunFolderError, match=advice):
            train(program, folder, "small", [event])
    train(program, folder, "small")
    assert_same_run(program, folder, whole[0])


def test_results_that_cannot_be_written_are_made_up_for(
    program, whole, tmp_path, monkeypatch
):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole[0].path, folder.path, dirs_exist_ok=True)
    (folder.path / loop.RESULT).unlink()
    with monkeypatch.context() as patch:

        def fail(self, name, document, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(RunFolder, "write_json", fail)
        advice = r"No space left .*; training is finished and saved: the same command"
        with pytest.raises(RunFolderError, match=advice):
            train(program, folder, "small")
    assert train(program, folder, "small")["tasks"] == whole[1]["tasks"]
    assert_same_run(program, folder, whole[0])


def test_places_that_are_no_fallback(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    for path in (run, run / "inside"):
        with pytest.raises(RunFolderError, match=r"is in the run folder .* outside"):
            check_fallback(path, run)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot be written \(Not a directory\)"):
        check_fallback(tmp_path / "file" / "inside", run)
    with pytest.raises(RunFolderError, match=r"which the run folder .* is in; choose"):
        check_fallback(tmp_path, run)
    check_fallback(other, run)
    check_fallback(tmp_path / "absent", run)
    assert not (tmp_path / "absent").exists()
    (other / "notes").write_text("")
    with pytest.raises(RunFolderError, match="is not empty; choose another"):
        check_fallback(other, run)
    (other / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="holds a run; continue that by --workdir"):
        check_fallback(other, run)


class StopAfter:
    """A signal that comes in a step."""

    def __init__(self, step):
        self.step = step

    def held(self):
        return contextlib.nullcontext()

    def interrupted(self):
        return False

    def stops_after(self, step):
        return signal.SIGTERM if step == self.step else None


# Of each kind; all of them continue in test_methods_continue.py, below the loop.
METHODS = (optim.gradvac, optim.moco, optim.famo)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_runs_of_methods_continue_to_the_last_bit(tmp_path, method, dtype):
    program = build(method, dtype)
    undisturbed, folder = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    train(program, undisturbed, "small")
    # Between two checkpoints, at one, and where an evaluation is.
    for step in (1, 2, 3, 5):
        with pytest.raises(StoppedError):
            train(program, folder, "small", signals=StopAfter(step))
    train(program, folder, "small")
    assert_same_run(program, folder, undisturbed)
