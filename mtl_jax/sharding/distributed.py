"""Several processes, one a host, that work as one.

Every process runs the same program. It reads its own rows of every batch, and computes
on its own devices what they hold of every global array. Process 0 alone writes.
"""

import hashlib
import json
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Int

from mtl_jax.sharding.leaving import explain_aborts

CONNECT_SECONDS = 300
"""How long a process waits for the others when it starts."""

SILENT_SECONDS = 40
"""After so long without a sign of life, a process is taken for lost."""

SHARED_SECONDS = 60.0
"""How long a process looks for a file that process 0 has just written."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: float = CONNECT_SECONDS,
) -> None:
    """Joins this process with the others; must come before JAX sees its devices.

    Without arguments, JAX asks the cluster that it runs on: Cloud TPU, GKE, SLURM and
    Open MPI. Elsewhere all three are needed.

    Args:
      coordinator: ``host:port`` of process 0, which listens there; the same for all.
      num_processes: How many processes there are.
      process_id: Which one this is, from 0.
      timeout_seconds: How long to wait for the others.

    Raises:
      ValueError: If the arguments are incomplete or out of range, there is no cluster
        that JAX knows, the port of process 0 is taken, or not all processes come.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        _check_address(coordinator, num_processes, process_id)
    failures: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                *given,
                cluster_detection_method="deactivate" if coordinator else None,
                # JAX kills the process when its own time is over.
                initialization_timeout=int(timeout_seconds) + 60,
                heartbeat_timeout_seconds=SILENT_SECONDS,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if thread.is_alive():
        which = (
            f"process {process_id} of {num_processes}"
            if coordinator
            else "this process"
        )
        raise ValueError(
            f"{which} waited {timeout_seconds:.0f} s for the others at "
            f"{coordinator or 'the coordinator of the cluster'}; start all of them, "
            "with the same coordinator, an address of process 0 that all can reach"
        )
    if failures:
        if not coordinator and "should be defined" in str(failures[0]):
            raise ValueError(
                "found no cluster that JAX knows (Cloud TPU, GKE, SLURM, Open MPI); "
                "give --coordinator, --num-processes and --process-id"
            )
        raise ValueError(f"cannot join the other processes: {failures[0]}")
    explain_aborts()
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # JAX lets only process 0 read the cache, and on CPUs a program that it loads
        # and the others compile has been seen to wait for ever in a collective.
        jax.config.update("jax_enable_compilation_cache", False)


def _check_address(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "of coordinator, num_processes and process_id, some are missing; give all "
            "three, or none where JAX knows the cluster"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"coordinator is {coordinator!r}; it must be HOST:PORT, an address of "
            "process 0"
        )
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; it must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id is {process_id}; with num_processes={num_processes} it must "
            f"be at least 0 and at most {num_processes - 1}"
        )
    if process_id == 0:
        # JAX would end the process without a word of Python.
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(
                f"coordinator is {coordinator!r}, but process 0 cannot listen on port "
                f"{port} ({error.strerror}); choose another port for all processes"
            ) from error


def is_main() -> bool:
    """Whether this process is the one that writes logs and results."""
    return jax.process_index() == 0


def local_rows(sharding: Sharding, num_rows: int) -> Int[np.ndarray, " rows"]:
    """Rows that the devices of this process hold of a global array.

    Args:
      sharding: How the array's first axis is split.
      num_rows: Length of that axis, over all processes.

    Returns:
      Positions in the axis, ascending. Processes whose devices hold the same rows, as
      along the mesh axis ``model``, all have them.

    Raises:
      ValueError: If rows of two processes overlap in part.
    """
    blocks: dict[int, set[tuple[int, int]]] = {}
    for device, (rows, *_) in sharding.devices_indices_map((num_rows,)).items():
        start, stop, _ = rows.indices(num_rows)
        blocks.setdefault(device.process_index, set()).add((start, stop))
    here = blocks[jax.process_index()]
    for process, there in blocks.items():
        if here != there and (here & there or len(here) != len(there)):
            raise ValueError(
                f"processes {jax.process_index()} and {process} hold examples that "
                "overlap in part; choose mesh.model so that it divides, or is a "
                "multiple of, the devices of a process"
            )
    return np.concatenate([np.arange(*block) for block in sorted(here)])


def check_same(document: Any) -> None:
    """Checks that this process stands where the others do.

    Args:
      document: What decides what a process does, as JSON.

    Raises:
      ValueError: In all processes, if they differ.
    """
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
    mine = np.frombuffer(digest, np.uint32)
    everybody = _gather(mine)
    for process, other in enumerate(everybody):
        if not np.array_equal(other, everybody[0]):
            raise ValueError(
                f"process {process} has another config, or finds another run in the "
                "run folder, than process 0; give all processes the same command, and "
                "a --workdir on storage that they share"
            )


def check_shared(folder: Path) -> None:
    """Checks that a folder is the same one for all processes.

    Args:
      folder: One that process 0 has made.

    Raises:
      ValueError: In all processes, if one of them does not see it.
    """
    if jax.process_count() == 1:
        return
    token = _gather(np.array([secrets.randbits(31)]))[0, 0]
    # A name that nobody has asked for before: absence may be remembered for long.
    mark = folder / f".shared-{token}"
    if is_main():
        mark.write_text("")
    deadline = time.monotonic() + SHARED_SECONDS
    while not (found := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    (absent,) = np.nonzero(~_gather(np.array(found)))
    if is_main():
        mark.unlink()
    if absent.size:
        raise ValueError(
            f"process {absent[0]} does not see {folder} of process 0; choose a "
            "--workdir on storage that all processes share"
        )


def _gather(value: np.ndarray) -> np.ndarray:
    """The values of all processes, stacked."""
    return np.atleast_1d(multihost_utils.process_allgather(value[None], tiled=True))
