"""The collectives of a compiled program: kind, bytes, mesh axes, how often, overlap."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from mtl_jax.scaling.hlo import Instruction, Module, Visit, visits

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of one device and how often it runs.

    Attributes:
      kind: Its opcode, such as ``"all-to-all"``.
      bytes: The larger of what a device puts in and gets out, of one run.
      times: Runs in a step.
      group: Positions in the flattened mesh of the devices of one of its groups.
      axes: Names of the mesh axes along which these differ.
      overlapped: Whether the program goes on while it runs.
    """

    kind: str
    bytes: int
    times: int
    group: tuple[int, ...]
    axes: tuple[str, ...]
    overlapped: bool


def find_collectives(module: Module, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Finds the collectives of a program.

    Those between groups of one device are left out, as nothing travels.

    Args:
      module: The compiled program.
      mesh_shape: Axis name -> size of the mesh that it was compiled for, in order.

    Returns:
      The collectives in the order of the program.
    """
    found = []
    chains = set()
    num_devices = math.prod(mesh_shape.values())
    for visit in visits(module):
        instruction = visit.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # XLA for TPU spreads a collective over a chain of fusions that compute
        # something else meanwhile; each of them repeats it.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        group = _group(instruction, num_devices)
        if len(group) < 2:
            continue
        scatters = kind == "all-reduce" and visit.fused and not chain
        found.append(
            Collective(
                # What XLA for TPU has for a reduce-scatter is a fusion of an all-reduce
                # and a slice.
                "reduce-scatter" if scatters else kind,
                _bytes(visit),
                visit.times,
                group,
                _axes(group, mesh_shape),
                bool(chain)
                or visit.asynchronous
                or instruction.opcode.endswith("-start"),
            )
        )
    return found


def _bytes(visit: Visit) -> int:
    instruction, computation = visit.instruction, visit.computation
    taken = sum(computation[name].bytes for name in instruction.operands)
    if not instruction.opcode.endswith("-start"):
        return max(taken, instruction.bytes)
    # What begins a collective makes a tuple with its operands and semaphores in it.
    done = (
        other.bytes
        for other in computation.values()
        if instruction.name in other.operands and other.opcode.endswith("-done")
    )
    return max(taken, *done, 0)


def _axes(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(np.array(group), tuple(mesh_shape.values())))
    differ = np.any(places != places[:, :1], axis=1)
    return tuple(axis for axis, d in zip(mesh_shape, differ, strict=True) if d)


def _group(instruction: Instruction, num_devices: int) -> tuple[int, ...]:
    """The devices of one group; of a permutation, those of one cycle or path."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.attributes)
    if pairs:
        return _connected(_numbers(pair) for pair in re.findall(r"\{(.*?)\}", pairs[1]))
    text = instruction.attributes.partition("replica_groups=")[2]
    return tuple(int(device) for device in _first_group(text, num_devices))


def _connected(pairs: Iterable[Sequence[int]]) -> tuple[int, ...]:
    targets = {source: target for source, target in pairs if source != target}
    if not targets:
        return ()
    # A path has a beginning; a cycle may be begun anywhere.
    starts = [*(set(targets) - set(targets.values())), *targets]
    path = [starts[0]]
    while (following := targets.get(path[-1])) is not None and following not in path:
        path.append(following)
    return tuple(path)


def _first_group(text: str, num_devices: int) -> Int[np.ndarray, " devices"]:
    """The first of ``replica_groups``, in any of the three notations of XLA."""
    if text.startswith("{}") or not text:
        return np.arange(num_devices)
    if text.startswith("{"):
        first = re.match(r"\{\{([\d,]*)\}", text)
        assert first
        return np.array(_numbers(first[1]), int)
    if text.startswith("["):
        sizes, devices = _iota(text)
        return devices.reshape(sizes)[0]
    return _mesh_group(text, num_devices)


def _iota(text: str) -> tuple[tuple[int, ...], Int[np.ndarray, " devices"]]:
    """Reads ``[groups,size]<=[sides]T(order)``: shape of the groups, and devices."""
    match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match, text[:80]
    sides = _numbers(match[2])
    devices = np.arange(math.prod(sides)).reshape(sides)
    if match[3]:
        devices = devices.transpose(_numbers(match[3]))
    return tuple(_numbers(match[1])), devices.reshape(-1)


def _mesh_group(text: str, num_devices: int) -> Int[np.ndarray, " devices"]:
    """Reads ``mesh['a'=4,'b'=2], device_ids=(...) {'a','b':(1)2}``."""
    match = re.match(r"mesh\[(.*?)\](.*?)\{(.*?)\}", text)
    assert match, text[:80]
    names = re.findall(r"'(.*?)'=(\d+)", match[1])
    sizes = {name: int(size) for name, size in names}
    devices = np.arange(num_devices)
    ids = re.search(r"device_ids=\(?(\[.*\]\S*|[\d,]+)", match[2])
    if ids:
        iota = ids[1].startswith("[")
        devices = _iota(ids[1])[1] if iota else np.array(_numbers(ids[1]))
    devices = devices.reshape(tuple(sizes.values()))
    # Every axis in three: before the part that counts, the part, and behind it.
    chosen = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'(.*?)'(?::\((\d+)\)(\d+))?", match[3])
    }
    split, kept = [], []
    for name, size in sizes.items():
        before, part = chosen.get(name, (size, 1))
        kept.append(len(split) + 1)
        split += [before, part, size // before // part]
    grid = devices.reshape(split)
    index = tuple(slice(None) if i in kept else 0 for i in range(len(split)))
    return grid[index].reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
