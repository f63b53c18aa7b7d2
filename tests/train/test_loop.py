import itertools
import json
import shutil

import numpy as np
import pytest
from same_run import assert_same_run, timing_lines
from small import Tiles, experiment

from mtl_jax import optim
from mtl_jax.train import (
    RunFolder,
    RunFolderError,
    build_program,
    evaluate_run,
    loop,
    train,
)
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.progress import ProgressDisplay


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def program():
    # PCGrad's state has a PRNG key; checkpoints are written at steps 2, 4 and 6.
    return build_program(experiment(aggregator=optim.pcgrad, checkpoints_kept=3))


@pytest.fixture(scope="module")
def whole(program, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("whole"))
    victim = tmp_path_factory.mktemp("victim") / "file"
    victim.write_text("precious")
    (folder.path / ".samples.npz").symlink_to(victim)
    result = train(program, folder, "small")
    assert victim.read_text() == "precious"
    return folder, result


def test_a_stopped_run_continues_bit_for_bit(program, whole, tmp_path, monkeypatch):
    uninterrupted, result = whole
    folder = RunFolder(tmp_path)
    update = ProgressDisplay.update

    def stop_after_five(self, step, *arguments, **keywords):
        update(self, step, *arguments, **keywords)
        if step == 5:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", stop_after_five)
        with pytest.raises(StoppedError):
            train(program, folder, "small")
    assert folder.read_json(loop.RESULT) is None
    lines = (tmp_path / loop.METRICS).read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5
    with (tmp_path / loop.METRICS).open("a") as file:
        file.write('{"step": 6, "bright/lo')

    continued = train(program, folder, "small")
    assert_same_run(program, folder, uninterrupted)
    assert continued["tasks"] == result["tasks"]

    # The time of both parts, but for what was lost, and the speed of all steps.
    timings = timing_lines(folder)
    assert [line["step"] for line in timings] == [1, 2, 3, 4, 5, 6]
    wall = [line["wall_time_seconds"] for line in timings]
    assert wall == sorted(wall)
    assert wall[4] > wall[3] + continued["cost"]["compile_seconds"]
    assert continued["wall_time_seconds"] > wall[5]
    seconds = sum(line["seconds_per_step"] for line in timings[1:])
    speed = continued["cost"]["examples_per_second"]
    np.testing.assert_allclose(speed, 5 * 16 / seconds)


@pytest.mark.slow
def test_data_that_cannot_be_read_cost_no_step(program, whole, tmp_path, monkeypatch):
    uninterrupted, _ = whole
    folder = RunFolder(tmp_path)
    shares = program.experiment.mixture.examples_per_batch(program.share_multiple)
    record, reads = Tiles.__getitem__, itertools.count(1)

    def fails_in_the_sixth_batch(self, index):
        if self.seed == 0 and next(reads) > 5.5 * shares["tiles"]:
            raise OSError("stale file handle")
        return record(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Tiles, "__getitem__", fails_in_the_sixth_batch)
        with pytest.raises(OSError, match="stale file handle"):
            train(program, folder, "small")
    # Checkpoints are due after even steps.
    assert Checkpoints(tmp_path / loop.CHECKPOINTS, read_only=True).steps == [2, 4, 5]

    train(program, folder, "small")
    assert_same_run(program, folder, uninterrupted)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(program, whole, tmp_path):
    """Not even where it had but one, and was killed right after it."""
    copy = tmp_path / "run"
    shutil.copytree(whole[0].path, copy)
    assert json.loads((copy / "first_checkpoint.json").read_text()) == {"step": 2}
    for path in (copy / loop.CHECKPOINTS).iterdir():
        shutil.rmtree(path)
    (copy / loop.RESULT).unlink()
    lines = (copy / loop.METRICS).read_bytes().splitlines(keepends=True)[:2]
    (copy / loop.METRICS).write_bytes(b"".join(lines))
    with pytest.raises(
        RunFolderError, match=r"no checkpoint in .*, but .*first_checkpoint.json says"
    ) as error:
        train(program, RunFolder(copy), "small")
    assert "put them back, or choose another --workdir" in str(error.value)
    assert (copy / loop.METRICS).read_bytes() == b"".join(lines)


def test_metrics_are_flat_and_complete(whole):
    folder, _ = whole
    lines = [
        json.loads(line)
        for line in (folder.path / loop.METRICS).read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        for task in ("bright", "redness", "direction", "phase"):
            assert line[f"{task}/loss"] > 0
            assert line[f"{task}/gradient_norm"] >= 0
            assert 0 <= line[f"{task}/dropped_tokens"] < 1
            load = line[f"{task}/expert_load/block_1"]
            assert len(load) == 4
            np.testing.assert_allclose(sum(load), 1, rtol=1e-5)
        assert np.shape(line["all/cosine"]) == (4, 4)
        assert {"all/conflict_rate", "all/update_norm", "all/parameter_norm"} < set(
            line
        )
    assert [line["step"] for line in lines if "bright/accuracy" in line] == [3, 6]
    assert lines[-1]["redness/r2"] is not None


def test_timings_are_apart(whole):
    folder, result = whole
    lines = timing_lines(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["seconds_per_step"] > 0 for line in lines)
    assert all(0 <= line["input_stall"] <= 1 for line in lines)
    assert result["cost"]["examples_per_second"] > 0


def test_the_result_says_what_was_run(whole):
    folder, result = whole
    assert json.loads((folder.path / loop.RESULT).read_text()) == result
    assert result["mesh"] == {"data": 2, "fsdp": 1, "expert": 4, "model": 1}
    assert result["method"]["aggregator"] == "pcgrad"
    assert result["sources"]["tiles"]["examples_per_step"] == 8
    assert result["cost"]["active_parameters"] < result["cost"]["parameters"]
    assert set(result["tasks"]) == {"bright", "redness", "direction", "phase"}
    samples = np.load(folder.path / "samples.npz", allow_pickle=False)
    assert samples["tiles/bright/prediction"].shape == (6, 8, 8)
    routing = {name: samples[name] for name in samples if "/routing/" in name}
    assert set(routing) == {f"tiles/routing/{t}/block_1" for t in ("bright", "redness")}
    for experts in routing.values():
        assert experts.shape == (6, 2, 2)
        assert len(np.unique(experts)) > 1
        assert set(np.unique(experts)) <= set(range(4))
    wrong = [
        samples[f"stripes/{task}/target"] != samples[f"stripes/{task}/prediction"]
        for task in ("direction", "phase")
    ]
    assert np.all(np.any(wrong, axis=0))


def test_evaluating_the_last_checkpoint_gives_the_result_again(program, whole):
    folder, result = whole
    step, tasks = evaluate_run(program, folder, None)
    assert step == 6
    assert tasks == result["tasks"]


def test_evaluating_an_absent_checkpoint_names_those_there(program, whole):
    folder, _ = whole
    with pytest.raises(ValueError, match=r"no checkpoint 5; it has \[2, 4, 6\]"):
        evaluate_run(program, folder, 5)
