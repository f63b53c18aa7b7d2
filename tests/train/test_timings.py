"""The stopwatch of a run, by a clock that is set by hand."""

import pytest

from mtl_jax.train.run_folder import RunFolderError
from mtl_jax.train.timings import Timings


class Clock:
    """Stands in for ``time.monotonic``."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("mtl_jax.train.timings.time.monotonic", clock)
    return clock


def stretch(timings, clock, step, seconds, waited=0.0, evaluating=0.0):
    """One line about training up to ``step``, and an evaluation."""
    timings.start()
    with timings.waiting():
        clock.now += waited
    clock.now += seconds - waited
    timings.stop(step)
    clock.now += evaluating
    return timings.line()


def test_a_line_by_hand(clock):
    timings = Timings(batch_size=8, started=clock.now)
    clock.now += 20  # compiling
    assert stretch(timings, clock, 5, 10.0, waited=1.0, evaluating=3.0) == {
        "step": 5,
        "seconds_per_step": 2.0,
        "examples_per_second": 4.0,
        "input_stall": 0.1,
        "wall_time_seconds": 33.0,
    }
    # Two steps in one second; neither compiling nor evaluating is counted.
    line = stretch(timings, clock, 7, 1.0)
    assert line["seconds_per_step"] == 0.5
    assert line["wall_time_seconds"] == 34.0
    assert timings.wall_time_seconds == 34.0


def test_the_average_leaves_the_first_line_out(clock):
    timings = Timings(batch_size=8, started=clock.now)
    assert timings.average() == {"examples_per_second": None, "input_stall": None}
    stretch(timings, clock, 2, 10.0, waited=5.0)
    assert timings.average() == {"examples_per_second": 1.6, "input_stall": 0.5}
    stretch(timings, clock, 6, 2.0, waited=1.0)
    stretch(timings, clock, 8, 2.0)
    # 6 steps of 8 examples in 4 seconds, one of which was spent waiting.
    assert timings.average() == {"examples_per_second": 12.0, "input_stall": 0.25}


def test_a_continued_run_counts_from_its_beginning(clock):
    first = Timings(batch_size=8, started=clock.now)
    lines = [stretch(first, clock, 2, 10.0), stretch(first, clock, 6, 2.0)]
    clock.now += 500  # stopped
    second = Timings(batch_size=8, started=clock.now)
    for line in lines:
        second.resume(line)
    clock.now += 20
    line = stretch(second, clock, 8, 4.0)
    assert line["seconds_per_step"] == 2.0
    assert line["wall_time_seconds"] == 12.0 + 24.0
    assert second.wall_time_seconds == 36.0
    assert second.average()["examples_per_second"] == 6 * 8 / 6.0


@pytest.mark.parametrize("damage", [{"input_stall": None}, {"wall_time_seconds": "x"}])
def test_lines_of_another_making_are_refused(clock, damage):
    line = stretch(Timings(8, clock.now), clock, 2, 1.0)
    with pytest.raises(RunFolderError, match=r"the line of step 2 in timings\.jsonl"):
        Timings(8, clock.now).resume(line | damage)
