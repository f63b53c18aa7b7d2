"""``mtl-jax watch``: a live view of runs that other processes train."""

import argparse
import contextlib
import io
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from mtl_jax.cli.errors import user_errors
from mtl_jax.report.live import RunFollower
from mtl_jax.report.live_view import Frame

if sys.platform != "win32":
    import termios
    import tty

REFRESH_SECONDS = 1.0


def add(commands: Any) -> None:
    """Adds the commands of this module to the parser's."""
    watch = commands.add_parser("watch", help="follow runs that train elsewhere")
    watch.add_argument("runs", type=Path, nargs="+", metavar="DIR")
    watch.add_argument(
        "--once", action="store_true", help="print what there is now, and end"
    )
    watch.set_defaults(command=_watch)


def _watch(options: argparse.Namespace) -> None:
    with user_errors():
        _check(options.runs, options.once)
    followers = [RunFollower(path) for path in options.runs]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of tasks may have letters that the terminal does not know.
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    sees = console.is_terminal and not console.is_dumb_terminal
    if sees and not options.once:
        # A second Ctrl-C while all is put back is of no concern.
        with contextlib.suppress(KeyboardInterrupt), _keyboard() as pressed:
            _follow(followers, console, pressed)
    console.print(_frame(followers))


def _check(runs: Sequence[Path], once: bool) -> None:
    """Raises a ValueError if a folder is none, or absent where nobody waits for it."""
    for path in runs:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; give the folder of a run")
        if once and not path.exists():
            raise ValueError(f"{path} does not exist; give the folder of a run")


def _frame(followers: Sequence[RunFollower], height: int | None = None) -> Frame:
    now = time.time()
    return Frame([follower.look(now) for follower in followers], height)


def _follow(
    followers: Sequence[RunFollower],
    console: Console,
    pressed: Callable[[float], str],
) -> None:
    """Draws until `q` is pressed."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_frame(followers, console.height), refresh=True)
            if pressed(REFRESH_SECONDS) == "q":
                return


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """A function that waits for a key, at most so many seconds."""
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    number = sys.stdin.fileno()

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([number], [], [], seconds)
        if not ready:
            return ""
        # Nothing where something was to be read: the terminal is gone.
        return os.read(number, 1).decode(errors="replace") or "q"

    before = termios.tcgetattr(number)
    tty.setcbreak(number)
    try:
        yield pressed
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
