"""The sign of life of a run, by clocks that are set by hand."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from mtl_jax.train.heartbeat import HEARTBEAT, Heartbeat
from mtl_jax.train.run_folder import RunFolder


class StoppedError(Exception):
    pass


class Clocks:
    """Stands in for ``time``: one clock for dates, one for durations."""

    def __init__(self):
        self.now = 0.0

    def time(self):
        return 1e9 + self.now

    def monotonic(self):
        return self.now


@pytest.fixture
def clocks(monkeypatch):
    clocks = Clocks()
    monkeypatch.setattr("mtl_jax.train.heartbeat.time", clocks)
    return clocks


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def heartbeat(clocks, folder):
    return Heartbeat(folder, 10, {"digit": "accuracy"}, (StoppedError,), interval=5.0)


def read(folder):
    return json.loads((folder.path / HEARTBEAT).read_text())


def test_it_says_who_and_where(heartbeat, folder):
    with heartbeat:
        assert read(folder) == {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "num_steps": 10,
            "headlines": {"digit": "accuracy"},
            "step": None,
            "state": "starting",
            "since": 1e9,
            "time": 1e9,
        }


def test_a_life_by_hand(heartbeat, folder, clocks):
    seen = []

    def note():
        beat = read(folder)
        times = [beat[name] - 1e9 for name in ("since", "time")]
        seen.append((beat["state"], beat["step"], *times))

    with heartbeat:
        clocks.now = 1.0
        heartbeat.phase(0, "compiling")
        note()
        clocks.now = 30.0
        heartbeat.begin(1)
        note()
        for step, now in [(2, 33.0), (3, 34.9)]:
            clocks.now = now
            heartbeat.begin(step)
            note()
        clocks.now = 36.0
        heartbeat.begin(4)
        note()
        clocks.now = 36.5
        heartbeat.phase(4, "evaluating")
        note()
    note()
    assert seen == [
        ("compiling", 0, 1.0, 1.0),
        ("training", 0, 30.0, 30.0),
        # Two steps that are too early to be told.
        ("training", 0, 30.0, 30.0),
        ("training", 0, 30.0, 30.0),
        ("training", 3, 30.0, 36.0),
        ("evaluating", 4, 36.5, 36.5),
        ("finished", 4, 36.5, 36.5),
    ]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (StoppedError(), "stopped"),
        (ValueError("[red]no[/]"), "failed"),
        (MemoryError("x" * 10_000), "failed"),
    ],
)
def test_how_a_run_ends(heartbeat, folder, error, state):
    def run():
        with heartbeat:
            heartbeat.begin(7)
            raise error

    with pytest.raises(type(error)):
        run()
    beat = read(folder)
    assert (beat["state"], beat["step"]) == (state, 6)
    if state == "failed":
        assert beat["error"].startswith(f"{type(error).__name__}: {error}"[:300])
        assert len(beat["error"]) <= 300


def test_a_slow_file_system_is_asked_more_seldom(
    heartbeat, folder, clocks, monkeypatch
):
    """A write of 2 s, at 0.5 % of the time, must be followed by 400 s without one."""
    writes = []

    def slow(name, document, durable):
        writes.append(clocks.now)
        clocks.now += 2.0

    monkeypatch.setattr(folder, "write_json", slow)
    heartbeat.begin(1)
    while clocks.now < 1000:
        clocks.now += 1.0
        heartbeat.begin(2)
    assert writes == [0.0, 402.0, 804.0]


def test_a_folder_that_is_gone_is_reported_once(heartbeat, folder, clocks, capsys):
    shutil.rmtree(folder.path)
    with heartbeat:
        for step in range(1, 4):
            clocks.now += 10
            heartbeat.begin(step)
    error = capsys.readouterr().err
    assert error == (
        f"cannot write {folder.path / HEARTBEAT}: No such file or directory; "
        "the run goes on\n"
    )


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mtl_jax.train.heartbeat import Heartbeat
from mtl_jax.train.run_folder import RunFolder

folder = RunFolder(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Heartbeat(folder, 9, {}) as heartbeat:
    heartbeat.phase(1, "saving")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    heartbeat.phase(3, "saving")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    heartbeat.phase(5, "saving")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    heartbeat.phase(7, "saving")
"""


def test_a_full_disk_leaves_the_beat_before_and_does_not_end_the_run(folder):
    """In a process of its own, as the limit on the size of files is one's own."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, folder.path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("\n") == 1
    assert "File too large; the run goes on" in done.stderr
    assert read(folder)["step"] == 5


def test_only_the_process_that_writes_has_a_heart(tmp_path):
    folder = RunFolder(tmp_path / "run", writes=False)
    with Heartbeat(folder, 10, {}):
        pass
    assert not folder.path.exists()
