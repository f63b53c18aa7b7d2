"""Mutated configs and command lines: each runs, or ends with status 2 and one line."""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import hypothesis
import jax
import pytest
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))
import mutations
from watched import outside, watched

from mtl_jax import cli, train

HERE = Path(__file__).parent
REAL_TRAIN = train.train
# After so long, a command hangs. Most take a thousandth of it on an idle machine.
SECONDS = 120


@pytest.fixture(scope="module", autouse=True)
def standard_dtype_promotion():
    """Optax's schedules and its Adam mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with its own list of where modules are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(HERE)
    return tmp_path


class ReachedError(Exception):
    """A command would begin to train."""


class Trains:
    """Stands for `train.train`: trains at one of ``each`` calls, traces at others."""

    def __init__(self, each):
        self.count, self.each = 0, each

    def __call__(self, program, *arguments, **options):
        self.count += 1
        if self.count % self.each == 0:
            return REAL_TRAIN(program, *arguments, **options)
        with program.scope():
            state = nn.unbox(program.abstract_state)
            jax.eval_shape(program.step, state, program.abstract_batch())
        raise ReachedError


def fill(folder, content):
    """Makes a folder anew: what every command finds, and files of one of them."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy(HERE / mutations.CONFIG, folder)
    (folder / "folder.py").mkdir()
    (folder / "folder.json").mkdir()
    (folder / "taken").write_text("")
    for name, text in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def files(folder):
    """Every path in a folder with its content."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


class HangsError(BaseException):
    """A command takes too long; no ``except Exception`` in it keeps it going."""


@contextlib.contextmanager
def deadline(seconds, arguments):
    """Fails, with the command, where it goes on for longer."""

    def end(*_):
        raise HangsError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except HangsError:
        pytest.fail(f"goes on after {seconds} s: {arguments}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(arguments):
    """Runs a command here; returns its status (0 if it would train) and its errors."""
    error, known = io.StringIO(), [*sys.path]
    with (
        contextlib.redirect_stderr(error),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="error"),
        deadline(SECONDS, arguments),
    ):
        try:
            cli.main(arguments)
            status = 0
        except ReachedError:
            status = 0
        except SystemExit as exit_:
            status = exit_.code
        finally:
            sys.path[:] = known
    return status, error.getvalue()


def assert_runs_or_explains(arguments, content, folder):
    """The property that this file is about."""
    fill(folder, content)
    before = files(folder)
    with watched() as events:
        status, error = run(arguments)
    # Folders that could not be made are in the events too.
    events = [e for e in events if e[0] != "os.mkdir" or os.path.exists(e[1])]
    if status == 0:
        assert re.fullmatch(r"(trace of steps 1 to 1: \S+\n)?", error)
        assert outside(events, folder / "runs") == []
    else:
        assert status == 2, error
        assert error.startswith("mtl-jax: error: ")
        assert error.endswith("\n")
        assert error.count("\n") == 1
        assert error.strip("\n").isprintable()
        assert outside(events, folder) == []
        assert files(folder) == before
    return status


def check_many(monkeypatch, folder, number, each):
    """Tries that many commands, and trains by one of ``each`` that would.

    Returns how many got to the first step.
    """
    trains, statuses = Trains(each), []
    monkeypatch.setattr(train, "train", trains)

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @hypothesis.given(mutations.commands())
    def check(command):
        statuses.append(assert_runs_or_explains(*command, folder))

    check()
    assert len(statuses) >= number
    return trains.count


def test_mutated_commands(monkeypatch, folder):
    assert check_many(monkeypatch, folder, 25, each=8) > 0


@pytest.mark.slow
def test_500_mutated_commands(monkeypatch, folder):
    assert check_many(monkeypatch, folder, 500, each=1) > 25


def test_a_command_that_hangs_is_named(monkeypatch):
    def main(arguments):
        while True:
            with contextlib.suppress(Exception):
                signal.pause()

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setitem(globals(), "SECONDS", 0.01)
    with pytest.raises(pytest.fail.Exception, match=r"after 0.01 s: \['show', 'it'\]"):
        run(["show", "it"])


# What mutations found, and what they do not find each time.
@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("trunk.width=" + "-" * 5000 + "1", "it must be int"),
        ("trunk.width=" + "(" * 300, "it must be int"),
        ("trunk.width={[1]: 2}", "trunk.width is '{[1]: 2}' of type str"),
        ("trunk.width=" + "9" * 5000, "of type str; it must be int"),
        ("trunk.width=0x" + "f" * 5000, "is a number of thousands of digits"),
        ("optimizer.weight_decay=" + "9" * 400, "it must be finite"),
        (
            "optimizer.weight_decay=1e300",
            "weight_decay is 1e+300; it must be less than",
        ),
        ("trunk.position_grid=(1e999, 2)", "position_grid is (inf, 2)"),
        ("tasks.digit.name=\x1b[31m", "'\\x1b[31m' is no name for a task"),
        ("tasks.digit.name= ", "' ' is no name for a task"),
        ("mixture.components.data=3", "mixture.components.data is 3"),
        ("tasks.digit.metrics.0=3", "names an item of a sequence"),
    ],
)
def test_values_that_cannot_be(folder, assignment, expected):
    fill(folder, {})
    status, error = run(["show", f"{mutations.CONFIG}:dense", "--set", assignment])
    assert (status, error.count("\n")) == (2, 1)
    assert expected in error
    assert len(error) < 6000


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("config.trunk = config", "trunk contains what it is part of"),
        ("config.optimizer.b2 = config", "optimizer.b2 contains what it is part of"),
        ("config.rules.batch = fdl.Config(Digits, 'train')", "rules.batch is <Config"),
        ("config.trunk.moe = fdl.Partial(optim.uncertainty)", "trunk.moe cannot be"),
        ("config.sharpness = fdl.Partial(optim.gsam)", "sharpness cannot be called"),
        ("config.aggregator = fdl.Partial(Rules)", "aggregator cannot be called"),
        ("config.checkpoint_every = type", "checkpoint_every is type, which config.js"),
        ("config.trunk.mlp = fdl.Partial(optax.adam)", "the trunk or a head cannot be"),
        ("config.tasks[0].loss = huber", "the loss of task 'digit' does not take"),
        ("raise SystemExit(0)", "own.py, line 18: SystemExit: 0; mend the file"),
        ("config = fdl.Config(MeshShape)", "the config makes a MeshShape"),
    ],
)
def test_configs_that_cannot_be(folder, statement, expected):
    lines = ["def main():", "    config = ALL['dense']()", f"    {statement}"]
    lines += ["    return config", "VARIANTS = {'main': main}", ""]
    fill(folder, {"own.py": mutations.HEADER + "\n".join(lines)})
    status, error = run(["show", "own.py"])
    assert (status, error.count("\n")) == (2, 1), error
    assert expected in error


def test_a_seed_where_none_is_known(folder):
    body = "def main(): return fdl.Config(MeshShape)\nVARIANTS = {1: main}\n"
    fill(folder, {"own.py": mutations.HEADER + body})
    assert "no field 'seed'" in run(["show", "own.py", "--seed", "1"])[1]
    assert "its variants are 1\n" in run(["show", "own.py:main"])[1]


def test_an_argument_that_is_no_text(folder):
    # As Python gives bytes on the command line that are not UTF-8.
    status, error = run(["show", os.fsdecode(b"\xff\x1b[31m")])
    assert (status, error.count("\n")) == (2, 1)
    assert error.strip("\n").isprintable()
