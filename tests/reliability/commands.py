"""Commands in real processes, which tests may stop, kill and starve."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from mtl_jax.train import loop

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = HERE / "quick_config.py"
SECONDS = 300
"""After so long, a command hangs. It takes a fiftieth of it on an idle machine."""


class Command:
    """One that runs.

    Args:
      pid: Its process.
      output: File with what it prints.
      server: Says when it ends.
    """

    def __init__(self, pid, output, server):
        self.pid, self._output, self._server = pid, output, server

    @property
    def output(self):
        return self._output.read_text()

    def until(self, condition):
        """Waits until something holds; fails if the command ends before."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"too late: {self.output}"
            assert alive(self.pid), f"ended too early: {self.output}"
            time.sleep(0.002)

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """Its status, as `subprocess` has it."""
        return int(self._server.stdout.readline())


def alive(pid):
    """Whether a process runs; one that has ended waits for its server."""
    with contextlib.suppress(FileNotFoundError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


class Commands:
    """Starts commands, one after the other."""

    def __init__(self, cache):
        self._server = subprocess.Popen(
            [sys.executable, HERE / "forks.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
        )
        self._running = None

    def start(self, *arguments, folder):
        """Starts a command in a folder."""
        output = folder / "output.txt"
        output.write_text("")
        request = {
            "arguments": [*map(str, arguments)],
            "folder": str(folder),
            "output": str(output),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        self._running = Command(
            int(self._server.stdout.readline()), output, self._server
        )
        return self._running

    def close(self):
        """Ends all."""
        if self._running is not None and alive(self._running.pid):
            self._running.send(signal.SIGKILL)
        self._server.communicate()


def num_lines(folder):
    """Lines that a run has logged."""
    path = folder / loop.METRICS
    return path.read_text().count("\n") if path.exists() else 0


def saves_begun(folder):
    """Checkpoints that are being written."""
    return {path.name for path in (folder / loop.CHECKPOINTS).glob("*tmp*")}


def saved_steps(folder):
    """Steps of complete checkpoints, ascending."""
    paths = (folder / loop.CHECKPOINTS).glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdecimal())


def arrays(folder):
    """All arrays of a run's newest checkpoint, read by Orbax alone."""
    path = (
        folder / loop.CHECKPOINTS / str(saved_steps(folder)[-1]) / "state"
    ).absolute()
    checkpointer = ocp.PyTreeCheckpointer()
    leaves, structure = jax.tree.flatten(checkpointer.metadata(path).item_metadata.tree)
    kinds = structure.unflatten(len(leaves) * [ocp.RestoreArgs(np.ndarray)])
    restored = checkpointer.restore(path, restore_args=kinds)
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
    }


def assert_same_run(ours, theirs):
    """The same metrics and the same state, to the last bit."""
    assert (ours / loop.METRICS).read_bytes() == (theirs / loop.METRICS).read_bytes()
    assert saved_steps(ours)[-1] == saved_steps(theirs)[-1]
    mine, yours = arrays(ours), arrays(theirs)
    assert mine.keys() == yours.keys()
    assert len(mine) > 20
    for name, value in yours.items():
        assert mine[name].dtype == value.dtype
        assert mine[name].tobytes() == value.tobytes(), name
