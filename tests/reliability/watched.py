"""What the program does to the rest of the world, by Python's audit events."""

import contextlib
import os
import sys
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_events = None


def _hook(event, arguments):
    if _events is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = flags & WRITES or (isinstance(mode, str) and set(mode) & set("wax+"))
        if writes and not isinstance(path, int):
            _events.append((event, os.fsdecode(path)))
    elif event == "os.mkdir":
        # One that is there is left as it is.
        if not os.path.exists(arguments[0]):
            _events.append((event, os.fsdecode(arguments[0])))
    elif event in ("os.remove", "os.rmdir", "os.truncate"):
        _events.append((event, os.fsdecode(arguments[0])))
    elif event in ("os.rename", "os.link", "os.symlink"):
        _events.append((event, os.fsdecode(arguments[1])))
    elif event in (
        *("os.exec", "os.fork", "os.posix_spawn", "os.system", "subprocess.Popen"),
        *("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.bind"),
    ):
        _events.append((event, str(arguments)))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched():
    """Gives a list of what is written, run, unpickled or connected to meanwhile.

    Each is the audit event and the path or its other arguments.
    """
    global _events
    _events = mine = []
    try:
        yield mine
    finally:
        _events = None


def outside(events, folder):
    """Those of the events that are not about paths in a folder."""
    folder = Path(folder).resolve()
    return [
        (event, path)
        for event, path in events
        if path != os.devnull
        and (
            not event.startswith(("open", "os.mkdir", "os.re", "os.rm", "os.trunc"))
            or not Path(path).resolve().is_relative_to(folder)
        )
    ]
