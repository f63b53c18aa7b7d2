"""What the arrays of a checkpoint take in memory, against what its files hold."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mtl_jax.train import array_index
from mtl_jax.train.integrity import DamagedCheckpointError, listed_files
from mtl_jax.train.run_folder import RunFolderError

SMALL = 2**26
"""Bytes that arrays may take whatever the size of the files."""

INDEX_BYTES = 2**30
"""Memory that may be taken to list arrays; 100,000 take half of it."""

INDEX_SECONDS = 200
"""Time of the processor that this may take; 100,000 arrays take a tenth of it."""


@contextlib.contextmanager
def array_sizes_checked(folder: Path) -> Iterator[None]:
    """Checks that no array, nor a part that is read at once, exceeds what is there.

    The metadata of a stranger's checkpoint may claim any size for what they leave out
    or have compressed. In those that are written here, files hold every byte of every
    array.

    It is found out beside what is done in this context, and told at its end.

    Args:
      folder: The checkpoint, whose files agree with its manifest at the end.

    Raises:
      DamagedCheckpointError: If arrays are larger, or kept in another way than here.
      RunFolderError: If that cannot be found out within bounds of memory and time.
    """
    state = (folder / "state").absolute()
    limits = map(str, (INDEX_BYTES, INDEX_SECONDS))
    with subprocess.Popen(
        # Modules beside that file or in this folder, maybe a stranger's, stay apart.
        [sys.executable, "-P", array_index.__file__, str(state), *limits],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Threads for matrix products would take memory too.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    ) as reader:
        try:
            yield
        except BaseException:
            reader.kill()
            raise
        # Without it, arrays would be looked for in other files.
        if not (state / "manifest.ocdbt").is_file():
            reader.kill()
            raise DamagedCheckpointError(folder, "state/manifest.ocdbt is missing")
        answer, faults = reader.communicate()
    if reader.returncode in (-signal.SIGABRT, -signal.SIGXCPU):
        # No damage, as which a checkpoint of one's own would be set aside.
        raise RunFolderError(
            f"to list the arrays of the checkpoint {folder} takes more than "
            f"{INDEX_BYTES:,} bytes or {INDEX_SECONDS} seconds, as if it were made to "
            "exhaust this machine; use another one"
        )
    if reader.returncode == array_index.REFUSED:
        raise DamagedCheckpointError(folder, answer.strip())
    if reader.returncode != 0:
        last = (faults.strip().splitlines() or [f"status {reader.returncode}"])[-1]
        raise RunFolderError(
            f"the arrays of the checkpoint {folder} cannot be listed ({last}); try "
            "again, and look after this machine if it stays so"
        )
    claimed, held = (
        int(answer),
        sum((folder / name).stat().st_size for name in listed_files(folder)),
    )
    if claimed > held + SMALL:
        raise DamagedCheckpointError(
            folder, f"its arrays would take {claimed:,} bytes, and its files {held:,}"
        )
