"""What is seen of run folders in every state that they may be in."""

import io
import json
import math
import os
import random
import socket
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from mtl_jax.report.live import RunFollower, duration
from mtl_jax.report.live_view import ASCII_BARS, Frame, clean, sparkline
from mtl_jax.report.log_tail import LogTail, read_document

NOW = 1e9
BEAT = {
    "pid": os.getpid(),
    "host": socket.gethostname(),
    "num_steps": 100,
    "headlines": {"digit": "accuracy", "left": "r2"},
    "step": 41,
    "state": "training",
    "since": NOW - 500,
    "time": NOW - 2,
}


def metrics(step, **more):
    return {
        "step": step,
        "all/loss": 3.0 / step,
        "all/conflict_rate": 0.5,
        "digit/loss": 1.0 / step,
        "digit/dead_experts": 0.25,
        "digit/expert_load/block_1": [0.5, 0.5],
        "left/loss": 2.0 / step,
        **more,
    }


def timing(step):
    return {
        "step": step,
        "seconds_per_step": 2.0,
        "examples_per_second": 32.0,
        "input_stall": 0.125,
        "wall_time_seconds": 10.0 + 2.5 * step,
    }


def append(path, *lines):
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def folder(tmp_path):
    """A run at step 40 of 100 that was evaluated and saved after 20 steps."""
    path = tmp_path / "run"
    (path / "checkpoints" / "20").mkdir(parents=True)
    (path / "checkpoints" / "30.damaged").mkdir()
    scores = {"digit/test_loss": 1.5, "digit/accuracy": 0.75, "left/r2": None}
    append(path / "metrics.jsonl", metrics(10), metrics(20, **scores), metrics(40))
    append(path / "timings.jsonl", timing(10), timing(20), timing(40))
    write(path, "heartbeat", BEAT)
    write(path, "config", {"config": "digits:small", "fields": {"num_steps": 100}})
    return path


def write(path, name, document):
    (path / f"{name}.json").write_text(json.dumps(document))


def look(folder, now=NOW):
    return RunFollower(folder).look(now)


def drawn(*views, width=100, height=None):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(Frame(views, height))
    return console.file.getvalue()


def test_a_run_in_progress_by_hand(folder):
    view = look(folder)
    assert (view.mood, view.status) == ("working", "training, sign of life 2 s ago")
    assert (view.step, view.num_steps) == (41, 100)
    assert (view.evaluated_at, view.saved_at) == (20, 20)
    # 75 s of wall time from step 10 to step 40; 59 steps are left.
    assert view.seconds_per_step == 2.5
    assert view.seconds_left == 59 * 2.5
    assert (view.examples_per_second, view.input_stall) == (32.0, 0.125)
    assert view.conflict_rates == (0.5, 0.5, 0.5)
    digit, left = view.tasks
    assert (digit.name, digit.metric, digit.scores) == ("digit", "accuracy", (0.75,))
    assert digit.losses == (0.1, 0.05, 0.025)
    assert digit.dead_experts == 0.25
    assert (left.name, left.metric, left.dead_experts) == ("left", "r2", None)
    assert math.isnan(left.scores[0])
    assert view.problems == ()


def test_the_frame_shows_all_of_it(folder):
    text = drawn(look(folder))
    for part in (
        "digits:small",
        "● training, sign of life 2 s ago",
        "step 41 / 100",
        "41%, 2 min 28 s left",
        "32 examples/s, 2.5 s a step, 12 % waiting for data",
        "evaluated at 20, saved at 20",
        "0.0250",
        "0.7500",
        "25 %",
        "conflict rate",
    ):
        assert part in text
    assert {len(line) for line in text.splitlines()} == {100}


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_frame_is_as_wide_as_the_terminal(folder, width):
    assert {len(line) for line in drawn(look(folder), width=width).splitlines()} == {
        width
    }


def test_many_tasks_and_runs_leave_room_for_each_other(folder):
    write(folder, "heartbeat", BEAT | {"headlines": dict.fromkeys(map(str, range(90)))})
    view = look(folder)
    assert len(view.tasks) == 92
    text = drawn(view, view, height=40)
    assert len(text.splitlines()) <= 40
    assert text.count("80 more") == 2


@pytest.mark.parametrize(
    ("beat", "mood", "status"),
    [
        ({"time": NOW - 59}, "working", "training, sign of life 59 s ago"),
        ({"time": NOW - 180}, "lost", "no sign of life for 3 min"),
        ({"time": NOW + 900}, "working", "training, sign of life 0 s ago"),
        ({"state": "compiling", "since": NOW - 50}, "working", "compiling for 50 s"),
        (
            {"state": "evaluating", "since": NOW - 7200, "time": NOW - 7200},
            "quiet",
            "evaluating for 2 h",
        ),
        ({"state": "finished"}, "done", "finished"),
        (
            {"state": "stopped", "time": NOW - 3e5},
            "done",
            "stopped at step 41, 3 days ago; its command continues it",
        ),
        (
            {"state": "failed", "error": "ValueError: no"},
            "lost",
            "failed at step 41, 2 s ago: ValueError: no",
        ),
        ({"state": None}, "quiet", "no heartbeat: whether it goes on is not known"),
        ({"time": "noon"}, "quiet", "no heartbeat: whether it goes on is not known"),
    ],
)
def test_the_state_of_a_run(folder, beat, mood, status):
    write(folder, "heartbeat", BEAT | beat)
    view = look(folder)
    assert (view.mood, view.status) == (mood, status)


def test_steps_of_minutes_are_no_sign_of_death(folder):
    append(folder / "timings.jsonl", timing(41) | {"seconds_per_step": 60.0})
    write(folder, "heartbeat", BEAT | {"time": NOW - 599})
    assert look(folder).mood == "working"
    assert look(folder, NOW + 2).status == "no sign of life for 10 min"


def test_a_process_that_is_gone_is_told_from_one_that_is_busy(folder):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(folder, "heartbeat", BEAT | {"pid": process.pid})
    assert look(folder, NOW + 20).mood == "working"
    process.communicate(b"\n")
    # Right after its last sign it might be that of another machine of this name.
    assert look(folder).mood == "working"
    view = look(folder, NOW + 20)
    assert (view.mood, view.status) == (
        "lost",
        "its process is gone at step 41, 22 s after its last sign",
    )
    write(folder, "heartbeat", BEAT | {"pid": process.pid, "host": "elsewhere"})
    assert look(folder, NOW + 20).mood == "working"


def test_a_finished_run_needs_no_heartbeat(folder):
    (folder / "heartbeat.json").unlink()
    result = {"num_steps": 100, "tasks": {"digit": {"headline": "accuracy"}}}
    write(folder, "result", result)
    view = look(folder)
    assert (view.mood, view.status) == ("done", "finished")
    assert view.tasks[0].metric == "accuracy"


def test_a_folder_that_appears_later(tmp_path):
    follower = RunFollower(tmp_path / "run")
    assert follower.look(NOW).status == "waiting: there is no such folder yet"
    (tmp_path / "run").mkdir()
    assert follower.look(NOW).status == "waiting for the run to begin"
    append(tmp_path / "run" / "metrics.jsonl", metrics(1))
    view = follower.look(NOW)
    assert view.step == 1
    assert view.problems == ()
    assert "step 1" in drawn(view)


def test_a_half_written_line_is_read_once_it_is_whole(folder):
    follower = RunFollower(folder)
    follower.look(NOW)
    text = json.dumps(metrics(50))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text[:30])
        file.flush()
        assert follower.look(NOW).step == 41
        file.write(text[30:] + "\n")
    view = follower.look(NOW)
    assert view.step == 50
    assert view.problems == ()


def test_a_run_that_was_set_back_to_its_checkpoint(folder):
    """As training does it: the log is replaced by its beginning, and then grows."""
    follower = RunFollower(folder)
    assert len(follower.look(NOW).losses) == 3
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "new").write_text("".join(lines[:2]))
    os.replace(folder / "new", folder / "metrics.jsonl")
    append(folder / "metrics.jsonl", metrics(30), metrics(40), metrics(50))
    view = follower.look(NOW)
    assert view.losses == tuple(3.0 / step for step in (10, 20, 30, 40, 50))


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, *({"step": step} for step in range(1000)))
    log = LogTail(path, max_bytes=200)
    replaced, records = log.read()
    assert replaced
    last = records[0]["step"]
    assert 1000 - 200 // len('{"step": 999}\n') <= last < 1000
    assert [record["step"] for record in records] == list(range(last, 1000))
    append(path, {"step": 1000})
    assert log.read() == (False, [{"step": 1000}])
    append(path, {"step": 1001, "text": "x" * 300}, {"step": 1002})
    assert log.read() == (False, [{"step": 1002}])
    assert log.damaged == 0


DAMAGED_LINES = [
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b"3",
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": "7"}',
    b'{"step": 1' + b"0" * 5000 + b"}",
    b"",
]


@pytest.mark.parametrize("line", DAMAGED_LINES, ids=lambda line: repr(line[:14]))
def test_a_damaged_line_is_one_line_and_the_rest_is_read(folder, line):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    append(folder / "metrics.jsonl", metrics(50))
    view = look(folder)
    assert view.step == 50
    assert view.problems == ("a line of metrics.jsonl cannot be read",)
    assert "! a line of metrics.jsonl cannot be read" in drawn(view)


@pytest.mark.parametrize("name", ["heartbeat", "config", "result"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\udcff", "3"])
def test_damaged_documents_are_named(folder, name, text):
    path = folder / f"{name}.json"
    path.write_text(text, errors="surrogateescape")
    (problem,) = look(folder).problems
    assert problem.startswith(f"{name}.json is damaged: it is not")


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl", "heartbeat.json"])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)],
    ids=["pipe", "folder", "device"],
)
def test_what_is_no_file_is_named_and_does_not_hang(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    (problem,) = look(folder).problems
    assert problem == f"{name} cannot be read: it is not an ordinary file"


def test_a_document_without_end_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(ValueError, match=r"config\.json is damaged: it is too large"):
        read_document(tmp_path / "config.json")


def test_nothing_in_a_folder_steers_the_terminal(tmp_path):
    name = "[red]x[/red]\x1b[2J\x07\u202e[/]"
    path = tmp_path / "[bold]run\x1b]0;mine\x07"
    path.mkdir()
    append(path / "metrics.jsonl", {"step": 3, f"{name}/loss": 1.0})
    beat = BEAT | {"state": "failed", "error": name, "headlines": {name: name}}
    write(path, "heartbeat", beat)
    write(path, "config", {"config": name})
    text = drawn(look(path), width=200)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    # In the title, the status, and as names of a task and of a metric, one cut short.
    assert text.count("[red]x[/red]�[2") == 4
    assert text.count("[red]x[/red]�[2J��[/]") == 3
    assert "[bold]run�]0;mine�" in text


def test_damage_of_every_kind_leaves_a_frame(folder):
    """Bytes of the files changed at random, 100 times."""
    source = random.Random(0)
    names = ("metrics.jsonl", "timings.jsonl", "heartbeat.json", "config.json")
    originals = {name: (folder / name).read_bytes() for name in names}
    pieces = (b"1e999", b"null", b'"x"', b"[1]", b"{}", b"-", b"NaN", b"9" * 400, b"\n")
    for _ in range(100):
        for name, original in originals.items():
            data = bytearray(original)
            for _ in range(source.randrange(4)):
                place = source.randrange(len(data))
                if source.random() < 0.5:
                    data[place] = source.randrange(256)
                else:
                    end = place + source.randrange(20)
                    data[place:end] = source.choice(pieces)
            (folder / name).write_bytes(data)
        view = look(folder)
        text = drawn(view, width=80, height=30)
        assert {len(line) for line in text.splitlines()} == {80}
        assert len(view.problems) <= len(names)


def test_numbers_that_are_no_numbers(folder):
    """Each value of a line replaced in turn, by whatever JSON allows."""
    for name in metrics(1):
        for value in (None, True, "x", [], {}, 1e308, -1e308, 10**400, math.nan):
            line = metrics(60)
            if name != "step":
                line[name] = value
            append(folder / "metrics.jsonl", line)
            drawn(look(folder))


def test_sparklines_by_hand():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0, 0.0], 8) == "█▁"
    assert sparkline([3.0, 3.0], 8) == "▅▅"
    # Means of two, 0.5, 2.5 and 4.5: from the lowest to the highest.
    assert sparkline([0, 1, 2, 3, 4, 5], 3, ASCII_BARS) == "_=#"
    assert sparkline([1.0, math.nan, 2.0], 3) == "▁ █"
    assert sparkline([], 8) == sparkline([math.nan], 8) == ""
    assert sparkline([1.0], 0) == ""


@pytest.mark.parametrize("count", [1, 7, 24, 25, 1000])
def test_sparklines_are_never_wider_than_asked(count):
    line = sparkline(np.random.default_rng(0).normal(size=count).tolist(), 24)
    assert len(line) == min(count, 24)


def test_long_text_is_cut():
    assert len(clean("x" * 10_000).plain) == 160


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (180, "3 min"), (7200, "2 h"), (1e6, "12 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
