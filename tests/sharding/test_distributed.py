"""What one process can tell. Several at once are in tests/train/test_processes.py."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mtl_jax.sharding import distributed, leaving

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    number: int


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The blocks of rows that the devices of each process hold, by process."""

    blocks: tuple[tuple[int, ...], ...]
    num_blocks: int

    def devices_indices_map(self, shape):
        length = shape[0] // self.num_blocks
        return {
            Device(process, number): (slice(block * length, (block + 1) * length),)
            for process, blocks in enumerate(self.blocks)
            for number, block in enumerate(blocks)
        }


@pytest.mark.parametrize(
    ("blocks", "num_blocks", "expected"),
    [
        (((0, 1), (2, 3)), 4, [0, 1, 2, 3]),
        # As when a mesh follows the wires of a slice, and not the hosts.
        (((2, 0), (1, 3)), 4, [0, 1, 4, 5]),
        # Parts of one layer on both: the same examples.
        (((0, 1), (1, 0)), 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        (((0, 0), (1, 1)), 2, [0, 1, 2, 3]),
    ],
)
def test_rows_of_this_process(blocks, num_blocks, expected):
    rows = distributed.local_rows(Sharding(blocks, num_blocks), 8)  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows, expected)


def test_rows_that_overlap_in_part_are_refused():
    sharding = Sharding(((0, 0, 0, 1), (1, 1, 2, 2)), 3)
    with pytest.raises(ValueError, match=r"processes 0 and 1 .* choose mesh\.model"):
        distributed.local_rows(sharding, 6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (("host:1", 2, None), "some are missing; give all three"),
        ((None, 2, 0), "some are missing"),
        (("host", 2, 1), "coordinator is 'host'; it must be HOST:PORT"),
        ((":80", 2, 1), "it must be HOST:PORT"),
        (("host:port", 2, 1), "it must be HOST:PORT"),
        (("host:70000", 2, 1), "it must be HOST:PORT"),
        (("host:1", 0, 0), "num_processes is 0; it must be at least 1"),
        (("host:1", 2, 2), "process_id is 2; .* at least 0 and at most 1"),
        (("host:1", 2, -1), "process_id is -1"),
    ],
)
def test_an_address_that_cannot_be(address, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*address)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on port {port} \(Addr"):
            distributed.initialize(f"localhost:{port}", 2, 0)


# In a process of its own, as JAX has begun to compute in this one.
LONELY = """
from mtl_jax.sharding import distributed
from mtl_jax.sharding.leaving import leaving_at_once
for address in [(), ("127.0.0.1:9", 2, 1)]:
    try:
        distributed.initialize(*address, timeout_seconds=1)
    except ValueError as error:
        print(error)
with leaving_at_once():
    raise ValueError("the last word")
"""


def test_a_process_without_others_gives_up():
    clusters = ("SLURM", "OMPI", "KUBERNETES", "TPU", "JAX")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(clusters)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LONELY],
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert "ValueError: the last word" in done.stderr
    no_cluster, unreachable = done.stdout.splitlines()
    assert no_cluster.startswith("found no cluster that JAX knows")
    assert unreachable.startswith(
        "process 1 of 2 waited 1 s for the others at 127.0.0.1:9; start all of them"
    )


def test_a_single_process_agrees_with_itself(tmp_path):
    assert distributed.is_main()
    distributed.check_same({"a": 1})
    distributed.check_shared(tmp_path / "absent")
    assert not leaving.preempted(3)
    with pytest.raises(KeyError), leaving.leaving_at_once():
        raise KeyError
