"""A run is trained by one command at a time."""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mtl_jax.sharding.distributed import is_main
from mtl_jax.train.run_folder import RunFolderError, open_without_links

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
LEASE_SECONDS = 120.0
"""How long a file system of several machines may keep the lock of one that is dead."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def locked(folder: Path, lease_seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Keeps other commands from training in a folder.

    The operating system holds the lock, and lets go of it however this process ends.
    Where the file system knows no locks there is none. Of several processes, the first
    holds it for all.

    Args:
      folder: The run's folder.
      lease_seconds: How long to wait for a lock that another machine holds, which may
        be dead.

    Raises:
      RunFolderError: If another process trains there, or there is a link in the place
        of the file.
    """
    if sys.platform == "win32" or not is_main():
        yield
        return
    with open_without_links(folder / LOCK, "a+") as file:
        deadline, told = time.monotonic() + lease_seconds, False
        while not _take(file.fileno()):
            file.seek(0)
            process, _, host = file.read(200).strip().partition(" ")
            if host == socket.gethostname() or time.monotonic() > deadline:
                raise RunFolderError(
                    f"{folder} is being trained by another command (process {process} "
                    f"of {host}); wait for it or stop it, or choose another --workdir"
                )
            if not told:
                print(
                    f"{folder} is being trained by process {process} of {host}, or was "
                    f"when that died; waits up to {lease_seconds:.0f} s for it",
                    file=sys.stderr,
                )
                told = True
            time.sleep(min(1.0, lease_seconds))
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
        yield


def _take(number: int) -> bool:
    """Takes the lock of an open file, if nobody else has it."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
