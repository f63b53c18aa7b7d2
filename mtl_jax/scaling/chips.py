"""What the vendor says of each TPU chip, for limits and rooflines.

Peak rates, memory and interconnect are those of Google's Cloud TPU documentation, the
pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" under
https://docs.cloud.google.com/tpu/docs/. Interconnect is stated there a chip: v4 2,400,
v5e 1,600, v5p 4,800 and v6e 3,200 Gbit/s, TPU7x 1,200 GB/s in both directions together.
Divided by the links of a chip this is 50 GB/s in each direction of a link for v4 and
v5e, and 100 GB/s for the others. Nobody reaches these figures: they make a bound.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU.

    JAX sees a chip as one device, or as two where its halves do not share memory.

    Attributes:
      name: Name in a topology, such as ``"v5e"``.
      flops: Peak bfloat16 operations a second.
      memory: Bytes of high-bandwidth memory that the compiler may fill.
      memory_bandwidth: Its bytes a second.
      link_bandwidth: Bytes a second in each direction of one link to a neighbour.
      dimensions: Dimensions of the mesh or torus that the links form.
      devices: Devices that JAX sees.
      largest: Chips of the largest slice.
      longest: Chips along the longest side of a slice.
      wraps: Length of which every multiple closes a side to a ring.
    """

    name: str
    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    dimensions: int
    devices: int
    largest: int
    longest: int
    wraps: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1228e9, 50e9, 3, 1, 4096, 64, 4),
        Chip("v5e", 197e12, 16 * GIB, 819e9, 50e9, 2, 1, 256, 16, 16),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 100e9, 3, 1, 6144, 64, 4),
        Chip("v6e", 918e12, 32 * GIB, 1638e9, 100e9, 2, 1, 256, 16, 16),
        Chip("tpu7x", 2307e12, 192 * GIB, 7380e9, 100e9, 3, 2, 9216, 64, 4),
    )
}
"""Name -> chip, for the generations that can be compiled for."""
