"""Least time of a step: what compute, memory and interconnect each need by their peaks.

The model is that of a chip that does everything it can at the same time at the vendor's
peak rates. Compute, memory traffic and collectives that the compiler overlaps with them
run side by side and the slowest of them counts; collectives that it does not overlap
are added. Nothing is subtracted for latency, uneven routing or kernels below the peak,
so that a real step takes longer.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mtl_jax.scaling.collectives import Collective
from mtl_jax.scaling.topology import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, by what takes them.

    Attributes:
      compute: Matrix products at the peak rate.
      memory: Traffic with the chip's memory.
      overlapped: Mesh axes, joined by ``+`` -> collectives that run meanwhile.
      exposed: The same for collectives that everything waits for.
    """

    compute: float
    memory: float
    overlapped: dict[str, float]
    exposed: dict[str, float]

    @property
    def interconnect(self) -> float:
        """All collectives."""
        return sum(self.overlapped.values()) + sum(self.exposed.values())

    @property
    def total(self) -> float:
        """Least time of a step."""
        overlapped = sum(self.overlapped.values())
        return max(self.compute, self.memory, overlapped) + sum(self.exposed.values())

    @property
    def bound(self) -> str:
        """What takes the largest part of the time."""
        parts = {
            "compute": self.compute,
            "memory": self.memory,
            "interconnect": self.interconnect,
        }
        return max(parts, key=lambda name: parts[name])


def make_roofline(
    topology: Topology,
    mesh_devices: np.ndarray,
    *,
    flops: float,
    memory_bytes: float,
    collectives: Sequence[Collective],
) -> Roofline:
    """Adds up the least time of a step.

    Args:
      topology: The slice.
      mesh_devices: Its devices in the order of the mesh.
      flops: Operations of one device in bfloat16.
      memory_bytes: Traffic of one device with its memory.
      collectives: Those of one device.
    """
    chip = topology.chip
    overlapped: dict[str, float] = {}
    exposed: dict[str, float] = {}
    flat = mesh_devices.reshape(-1)
    for collective in collectives:
        devices = [flat[position] for position in collective.group]
        seconds = collective.times * collective_seconds(collective, devices, topology)
        times = overlapped if collective.overlapped else exposed
        axes = "+".join(collective.axes)
        times[axes] = times.get(axes, 0.0) + seconds
    return Roofline(
        compute=flops * chip.devices / chip.flops,
        memory=memory_bytes * chip.devices / chip.memory_bandwidth,
        overlapped=overlapped,
        exposed=exposed,
    )


def collective_seconds(
    collective: Collective, devices: Sequence, topology: Topology
) -> float:
    """Least time of one run of a collective.

    Gathers and scatters of ``b`` bytes pass ``b (n - 1) / n`` through the links of each
    of ``n`` chips, in both directions where the links close to a ring, along all sides
    of the slice at once. A reduction is a scatter and a gather. In an all-to-all half
    of what all chips hold crosses the middle of the slice, half of that in each
    direction; the middle of the longest side is the narrowest. A permutation takes
    one link.

    Args:
      collective: The collective.
      devices: The devices of one of its groups.
      topology: The slice.
    """
    spans = group_spans(devices, topology)
    link = topology.chip.link_bandwidth
    number, volume = len(devices), collective.bytes * topology.chip.devices
    if not spans:
        # The devices share a chip, and are linked at least as well as chips are.
        return collective.bytes / (link * topology.chip.dimensions)
    if collective.kind == "collective-permute":
        return volume / link
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        chips = math.prod(span.length for span in spans)
        crossing = volume * chips / 4
        return max(
            crossing / (chips / span.length * span.links * link) for span in spans
        )
    passes = 2 if collective.kind == "all-reduce" else 1
    links = sum(span.links for span in spans)
    return passes * volume * (number - 1) / number / (links * link)


@dataclasses.dataclass(frozen=True)
class Span:
    """How a group of devices lies along one side of a slice.

    Attributes:
      length: Chips of the group along the side.
      links: Links that a chip can use in each direction: 2 in a ring, 1 in a row, and
        a part of one where other groups lie in between and share it.
    """

    length: int
    links: float


def group_spans(devices: Sequence, topology: Topology) -> list[Span]:
    """The sides of the slice along which a group of devices is spread.

    Where the group is no box of the slice, its longest side alone counts.
    """
    places = np.array([device.coords for device in devices])
    spans = []
    for side, (size, wraps) in enumerate(
        zip(topology.shape, topology.wraps, strict=True)
    ):
        along = np.unique(places[:, side])
        if len(along) < 2:
            continue
        gap = int(np.diff(along).min())
        ring = wraps and len(along) * gap == size
        spans.append(Span(len(along), (2 if ring else 1) / gap))
    chips = len(np.unique(places, axis=0))
    if spans and math.prod(span.length for span in spans) != chips:
        longest = max(spans, key=lambda span: span.length)
        return [dataclasses.replace(longest, length=chips)]
    return spans
