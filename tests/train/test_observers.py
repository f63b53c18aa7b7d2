"""A run that is stopped and continued, and what its followers wrote of it."""

import collections
import gzip
import json
import re

import jax
import numpy as np
import pytest
from jax.profiler import ProfileData
from small import experiment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_jax.train import RunFolder, build_program, train
from mtl_jax.train.heartbeat import HEARTBEAT, Heartbeat
from mtl_jax.train.profile import Profile
from mtl_jax.train.tensorboard import TensorBoard

NAMES = ("bright", "redness", "direction", "phase")


class StoppedError(Exception):
    pass


class StopAfter:
    """Stops the run once a step is logged; notes all that it is told."""

    def __init__(self, last):
        self.last, self.calls = last, []

    def __enter__(self):
        self.calls.append("enter")
        return self

    def __exit__(self, kind, error, traceback):
        self.calls.append("exit")

    def phase(self, step, name):
        self.calls.append((name, step))

    def begin(self, step):
        self.calls.append(("begin", step))

    def update(self, step, metrics, timing, evaluated):
        self.calls.append(("update", step))
        if step == self.last:
            raise StoppedError


@pytest.fixture(scope="module")
def program():
    # One device, as then every operation of a step is there once. An evaluation is
    # after steps 3 and 6, a checkpoint after 2, 4 and 6.
    return build_program(experiment(num_experts=0, num_routers=None), jax.devices()[:1])


@pytest.fixture(scope="module")
def run(program, tmp_path_factory):
    """The folder of a run that was stopped after step 5, and continued from 4."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    headlines = dict.fromkeys(NAMES, "accuracy")
    stops, beats = [StopAfter(5), StopAfter(None)], []
    for part, stop in enumerate(stops):
        observers = [
            Heartbeat(folder, 6, headlines, (StoppedError,)),
            TensorBoard(folder.path / "tensorboard", NAMES),
            Profile(folder.path / "profile", 2, 4) if part == 0 else StopAfter(None),
            stop,
        ]
        try:
            train(program, folder, "small", observers)
        except StoppedError:
            assert part == 0
        beats.append(json.loads((folder.path / HEARTBEAT).read_text()))
    return folder.path, stops, beats


def test_what_an_observer_is_told(run):
    _, (first, second), _ = run
    assert first.calls == [
        "enter",
        ("compiling", 0),
        ("begin", 1),
        ("begin", 2),
        ("update", 1),
        ("update", 2),
        ("saving", 2),
        ("begin", 3),
        ("evaluating", 3),
        ("update", 3),
        ("begin", 4),
        ("update", 4),
        ("saving", 4),
        ("begin", 5),
        ("begin", 6),
        ("update", 5),
        "exit",
    ]
    assert second.calls == [
        "enter",
        ("compiling", 4),
        ("begin", 5),
        ("begin", 6),
        ("update", 5),
        ("evaluating", 6),
        ("update", 6),
        ("saving", 6),
        "exit",
    ]


def test_the_heartbeat_says_how_each_part_ended(run):
    _, _, (first, second) = run
    assert (first["state"], first["step"]) == ("stopped", 5)
    assert (second["state"], second["step"]) == ("finished", 6)
    assert second["num_steps"] == 6


def test_tensorboard_has_every_number_once(run):
    """Read by TensorBoard itself, against the log that the run is known by."""
    path, _, _ = run
    assert len(list((path / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    expected = collections.defaultdict(list)
    for log, prefix in (("metrics", ""), ("timings", "timing/")):
        for text in (path / f"{log}.jsonl").read_text().splitlines():
            line = json.loads(text)
            for name, value in line.items():
                if name != "step" and not isinstance(value, list):
                    number = np.nan if value is None else np.float32(value)
                    expected[prefix + name].append((line["step"], number))
    assert set(events.Tags()["scalars"]) == set(expected)
    assert {"bright/loss", "bright/accuracy", "timing/input_stall"} < set(expected)
    for name, points in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_array_equal(found, np.array(points, np.float64), name)


def test_tensorboard_has_the_cosines_of_each_evaluation(run):
    path, _, _ = run
    events = EventAccumulator(str(path / "tensorboard"), {"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["all/cosine"]
    assert [event.step for event in events.Images("all/cosine")] == [3, 6]


def trace(path):
    (folder,) = (path / "profile" / "plugins" / "profile").iterdir()
    return folder


def test_the_trace_is_of_the_steps_that_were_asked_for(run):
    folder = trace(run[0])
    (file,) = folder.glob("*.trace.json.gz")
    with gzip.open(file) as text:
        events = json.load(text)["traceEvents"]
    steps = [event for event in events if event.get("name") == "train"]
    assert [step["args"]["step_num"] for step in steps] == ["2", "3"]


def test_the_trace_has_whole_steps(program, run):
    """Every operation of the compiled step is there as often as there are steps."""
    folder = trace(run[0])
    (file,) = folder.glob("*.xplane.pb")
    counts = collections.Counter(
        event.name
        for plane in ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    )
    step, _ = program.compile_step()
    entry = step.as_text().split("\nENTRY ")[1]
    names = re.findall(r"^  (?:ROOT )?%?([\w.-]+) = .* fusion\(", entry, re.MULTILINE)
    assert len(names) > 20
    assert {name: counts[name] for name in names} == dict.fromkeys(names, 2)
