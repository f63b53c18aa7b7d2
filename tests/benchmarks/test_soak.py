"""A short soak: what a run holds while it goes on."""

import importlib
from pathlib import Path

import pytest

NUM_STEPS, SAVE_EVERY = 6_000, 500


@pytest.mark.slow
def test_nothing_grows_but_what_a_save_leaves(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    soak = importlib.import_module("soak")
    monkeypatch.setattr(soak, "SECONDS_BETWEEN", 0.2)
    often = {"checkpoint_every": SAVE_EVERY, "evaluate_every": 1_000}
    monkeypatch.setattr(soak, "SETTINGS", soak.SETTINGS | often)
    samples = soak.watch(tmp_path, NUM_STEPS)

    # All has been seen by then: saves, an evaluation, the deletion of a checkpoint.
    later = [row for row in samples if 2_000 <= row.step < NUM_STEPS]
    assert len(later) > 10
    assert len({row.compilations for row in later}) == 1
    half = len(later) // 2
    first, second = later[:half], later[half:]
    # Between saves; a save under way has files and threads of its own. Pools of threads
    # may still be filling up.
    for name, more in (("open_files", 0), ("threads", 2)):
        before, after = (
            min(getattr(row, name) for row in part) for part in (first, second)
        )
        assert after <= before + more, name
    # Two are kept, one may be in the making.
    assert max(row.checkpoints for row in later) <= 3
    before, after = (
        min(row.resident_megabytes for row in part) for part in (first, second)
    )
    saves = (second[-1].step - first[0].step) / SAVE_EVERY
    # Orbax and its storage keep a tenth of a megabyte of each save.
    assert after - before < 2 + 0.3 * saves
