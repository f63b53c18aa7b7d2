"""``mtl-jax watch`` from another shell: a terminal, keys, and what scripts see."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from mtl_jax import cli

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, str(ROOT / "run.py"), "watch"]
# Ctrl-C may be ignored where the tests themselves run in the background.
HEEDING_CTRL_C = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    log(path, 7)
    return path


def log(path, step):
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "digit/loss": 0.5}) + "\n")


class Terminal:
    """A pseudo-terminal in which the command runs."""

    def __init__(self, *arguments):
        self._end, inner = pty.openpty()
        termios.tcsetwinsize(inner, (30, 100))
        self.before = termios.tcgetattr(inner)
        self._inner, self._text = inner, ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEEDING_CTRL_C, *COMMAND, *map(str, arguments)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=os.environ | {"TERM": "xterm-256color"},
            start_new_session=True,
        )

    def wait_for(self, text):
        """Reads until a text is shown, colours aside; forgets all up to it."""
        deadline = time.monotonic() + 60
        while text not in self._text:
            assert time.monotonic() < deadline, self._text
            self._read(0.5)
        self._text = self._text.split(text, 1)[1]

    def end(self):
        """Exit status and the last that was shown, once the command ends."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self._text
            self._read(0.1)
        self._read(0.1)
        after = termios.tcgetattr(self._inner)
        self.hang_up()
        assert after == self.before
        return self.process.returncode, self._text

    def hang_up(self):
        os.close(self._inner)
        os.close(self._end)

    def press(self, keys):
        os.write(self._end, keys.encode())

    def _read(self, seconds):
        if select.select([self._end], [], [], seconds)[0]:
            text = os.read(self._end, 65536).decode(errors="replace")
            self._text += re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("stop", ["q", "Ctrl-C"])
def test_a_live_view_until_a_key_is_pressed(folder, stop):
    terminal = Terminal(folder, folder.parent / "later")
    terminal.wait_for("step 7")
    terminal.wait_for("waiting: there is no such folder yet")
    log(folder, 8)
    terminal.wait_for("step 8")
    (folder.parent / "later").mkdir()
    log(folder.parent / "later", 3)
    terminal.wait_for("step 3")
    if stop == "q":
        terminal.press("xq")
    else:
        terminal.process.send_signal(signal.SIGINT)
    status, text = terminal.end()
    assert status == 0
    assert "Traceback" not in text
    # The other screen is left, the cursor shown, and the last frame stays.
    assert "\x1b[?1049l" in text
    assert "\x1b[?25h" in text
    assert "step 8" in text.split("\x1b[?1049l")[1]


def test_the_view_ends_with_its_terminal(folder):
    terminal = Terminal(folder)
    terminal.wait_for("step 7")
    terminal.hang_up()
    assert terminal.process.wait(timeout=30) is not None


def test_once_is_for_scripts_and_needs_no_jax(folder):
    code = (
        "import sys; from mtl_jax import cli; cli.main(sys.argv[1:]); "
        "print([name for name in ('jax', 'flax', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "watch", "--once", folder],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    *frame, modules = done.stdout.splitlines()
    assert modules == "[]"
    assert frame[0].startswith("+-")
    assert any("step 7" in line for line in frame)
    assert done.stderr == ""


def test_without_a_terminal_there_is_one_frame(folder, capsys):
    cli.main(["watch", str(folder)])
    assert capsys.readouterr().out.count("step 7") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["watch", "metrics.jsonl"], "metrics.jsonl is a file; give the folder"),
        (["watch", "--once", "absent"], "absent does not exist; give the folder"),
        (["watch"], "--help"),
    ],
)
def test_mistakes(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
