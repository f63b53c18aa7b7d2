"""Slices of a TPU pod that need not be there.

libtpu, which compiles for TPUs, makes descriptions of their devices on any machine.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from mtl_jax.scaling.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice.

    Attributes:
      name: Its name, such as ``"v5e:4x4"``.
      chip: The generation of its chips.
      shape: Chips along each side, padded with 1 to three sides.
      devices: Descriptions of its devices, which cannot compute.
    """

    name: str
    chip: Chip
    shape: tuple[int, int, int]
    devices: Sequence[Any]

    @property
    def num_chips(self) -> int:
        """Chips of the slice; JAX may see two devices a chip."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, bool, bool]:
        """Whether the links along each side close to a ring.

        On the 2D generations only the full side of a pod does, on the 3D ones every
        side that consists of whole cubes of 4 x 4 x 4 chips does.
        """
        chip = self.chip
        in_cubes = chip.dimensions == 2 or all(s % chip.wraps == 0 for s in self.shape)
        closed = [in_cubes and s % chip.wraps == 0 for s in self.shape]
        return closed[0], closed[1], closed[2]


def prepare_environment() -> None:
    """Keeps JAX on the CPU, and libtpu silent and free to run several times at once.

    Must come before JAX starts its backends.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


@functools.cache
def make_topology(name: str) -> Topology:
    """Describes a slice.

    Args:
      name: Generation and chips along each side: ``v5e:4x4``, ``v5p:8x8x16``.

    Returns:
      The slice.

    Raises:
      ValueError: If there is no such slice, or libtpu is not installed or too old for
        this release of JAX.
    """
    chip, shape = _parse(name)
    _check_libtpu()
    options: dict[str, Any] = {}
    if chip.name == "v4":
        # Its two cores as the one device that they are on real slices.
        options["chip_config_name"] = "megacore"
    if chip.name == "tpu7x":
        _keep_sums_from_sparse_cores()
    if math.prod(shape) < 4:
        # Less than the board of four chips that is the default.
        options["chips_per_host_bounds"] = shape
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"topology {name!r} cannot be made: {error}; choose sides that are even"
        ) from error
    return Topology(name, chip, shape, tuple(description.devices))


def _keep_sums_from_sparse_cores() -> None:
    """On some meshes, such as pairs of devices, libtpu aborts where they add up."""
    flag = "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=false"
    given = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([flag, *given])


def _check_libtpu() -> None:
    remedy = f"pip install 'jax[tpu]=={jax.__version__}'"
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for TPUs needs libtpu, which is not installed; it comes with "
            f"the extra mtl_jax[tpu], or with {remedy}"
        )
    wanted = [
        match[1]
        for requirement in importlib.metadata.requires("jax") or []
        if (match := re.match(r"libtpu==([\d.]+)\.\*", requirement))
    ]
    there = importlib.metadata.version("libtpu")
    if wanted and not any(f"{there}.".startswith(f"{w}.") for w in wanted):
        # Another one compiles some operations otherwise, and prints what is unreadable.
        raise ValueError(
            f"libtpu {there} is installed, but JAX {jax.__version__} is made for "
            f"{wanted[0]}.*; install that with {remedy}"
        )


def _parse(name: str) -> tuple[Chip, tuple[int, int, int]]:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise ValueError(
            f"topology {name!r} is unknown; give one of {', '.join(CHIPS)} and the "
            "chips along each side, such as v5e:4x4 or v5p:8x8x16"
        )
    chip, sides = CHIPS[match[1]], [int(side) for side in match[2].split("x")]
    if len(sides) != chip.dimensions:
        raise ValueError(
            f"topology {name!r} has {len(sides)} sides, but {chip.name} has "
            f"{chip.dimensions}: give the chips along each"
        )
    if min(sides) < 1 or max(sides) > chip.longest or math.prod(sides) > chip.largest:
        raise ValueError(
            f"topology {name!r} does not exist: {chip.name} slices have 1 to "
            f"{chip.longest} chips along a side and at most {chip.largest:,} in all"
        )
    x, y, z = (*sides, 1)[:3]
    return chip, (x, y, z)
