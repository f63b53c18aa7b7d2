"""What compiled programs send between devices, read from their text."""

import math
import re
from typing import NamedTuple

KINDS = (
    "ragged-all-to-all|all-to-all|all-gather|all-reduce|reduce-scatter"
    "|collective-permute|collective-broadcast"
)
BYTES = {"f32": 4, "s32": 4, "bf16": 2}


class Sent(NamedTuple):
    """One collective.

    Attributes:
      kind: Its opcode, without ``-start``.
      arrays: Type and sorted sizes of the arrays that it returns.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]

    def bytes(self) -> int:
        return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes in self.arrays)


def travelling(program: str) -> list[Sent]:
    """All collectives of a program but those of single devices."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
        if match is None or "replica_groups={{0},{1}" in line:
            continue
        arrays = tuple(
            (dtype, tuple(sorted(int(size) for size in sizes.split(",") if size)))
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        )
        found.append(Sent(match[2], arrays))
    return found


def summed(sent: list[Sent], at_least: int) -> list[tuple[int, ...]]:
    """Sorted sizes of the arrays of so many numbers that devices add up, in order."""
    arrays = [array for one in sent if one.kind == "all-reduce" for array in one.arrays]
    return sorted(sizes for _, sizes in arrays if math.prod(sizes) >= at_least)


def weights(
    experts: int, width: int, hidden: int, all_experts: int
) -> list[tuple[int, ...]]:
    """What `summed` is if just gradients are: a device's experts, and one gate."""
    per_expert = [(width,), (hidden,), (width, hidden), (width, hidden)]
    shapes = [(experts, *shape) for shape in per_expert] + [(width, all_experts)]
    return sorted(tuple(sorted(shape)) for shape in shapes)
