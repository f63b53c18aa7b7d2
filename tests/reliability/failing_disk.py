"""A command whose process has a disk that fails once a step is logged.

    python failing_disk.py FAULT:STEP ARGUMENT...

FAULT is one of those below; or ``results``, for a disk that fails when all is trained;
or anything else for a sound one. Where there is a fallback, it is on a sound disk, but
for the fault ``everywhere``.
"""

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

from mtl_jax.cli import main
from mtl_jax.train import loop
from mtl_jax.train.progress import ProgressDisplay

UNLIMITED = resource.RLIM_INFINITY
# The files of a checkpoint that hold arrays are larger, all others are smaller.
SMALL_FILES = 2**16


def limit(size):
    """Lets no file grow beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, UNLIMITED))


def no_checkpoints():
    """Puts a file where the folder of the checkpoints was."""
    folder = Path(sys.argv[sys.argv.index("--workdir") + 1]) / "checkpoints"
    shutil.rmtree(folder)
    folder.write_text("in the way")


def full_and_stopped():
    """The machine is to be taken away as well."""
    limit(1)
    os.kill(os.getpid(), signal.SIGTERM)


FAULTS = {
    "full": lambda: limit(1),
    "full_and_stopped": full_and_stopped,
    "large": lambda: limit(SMALL_FILES),
    "everywhere": lambda: limit(SMALL_FILES),
    "no_checkpoints": no_checkpoints,
}


def arrange(fault, number):
    """Lets the disk fail once a step is logged."""
    update, rescue = ProgressDisplay.update, loop.rescue
    collect = loop.collect_samples

    def failing(self, step, *arguments, **keywords):
        update(self, step, *arguments, **keywords)
        if step == number and fault in FAULTS:
            FAULTS[fault]()

    def elsewhere(*arguments):
        if fault != "everywhere":
            limit(UNLIMITED)
        return rescue(*arguments)

    def before_results(*arguments):
        if fault == "results":
            limit(1)
        return collect(*arguments)

    loop.collect_samples = before_results
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ProgressDisplay.update, loop.rescue = failing, elsewhere


if __name__ == "__main__":
    fault, _, step = sys.argv[1].partition(":")
    arrange(fault, int(step or 0))
    main(sys.argv[2:])
