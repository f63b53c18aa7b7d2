"""Traffic of a compiled program with the chip's memory.

XLA's own count takes the body of a loop once. This one takes it as often as it runs,
and counts what each instruction reads and writes: every operand and every result once,
in its padded layout, except that

- a fusion counts as one instruction: its inner values stay on the chip;
- what is only sliced or gathered from is read in part, and what is only updated in part
  is written in part;
- what XLA has put into another memory space is on the chip already;
- parameters, tuples, bitcasts and the like move nothing.

A matrix product that does not fit on the chip reads its operands more than once, which
is left out; so is what stays on the chip between two instructions unknown to XLA.
"""

import math
import re
from collections.abc import Mapping

from mtl_jax.scaling.hlo import BITS, ArrayType, Instruction, Module, Visit, visits

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("while", "conditional", "call", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "async-start", "async-update", "add-dependency"),
}
"""Opcodes that move nothing, or whose computations are visited by themselves."""

SLICES = ("slice", "dynamic-slice", "gather")


def memory_bytes(module: Module) -> int:
    """Bytes that one device reads from and writes to its memory in a step."""
    return sum(
        visit.times * _bytes(module, visit)
        for visit in visits(module)
        if not visit.fused
    )


def padded_bytes(array: ArrayType) -> int:
    """Bytes that an array takes in memory: its last axes fill whole tiles."""
    bits = 8 if array.dtype.startswith("f8") else BITS[array.dtype]
    order, _, rest = array.layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if not tile or not array.shape:
        return array.bytes
    sides = [int(side) for side in tile[1].split(",")]
    # The layout lists axes from the innermost out, a tile its sides the other way.
    axes = [int(axis) for axis in order.split(",")][: len(sides)]
    shape = list(array.shape)
    for axis, side in zip(axes, reversed(sides), strict=False):
        shape[axis] = math.ceil(shape[axis] / side) * side
    return math.ceil(math.prod(shape) * bits / 8)


def _size(array: ArrayType) -> int:
    return padded_bytes(array) if array.in_memory else 0


def _bytes(module: Module, visit: Visit) -> int:
    instruction, computation = visit.instruction, visit.computation
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and not instruction.operands:
        return 0  # an allocation
    result = sum(_size(array) for array in instruction.types)
    operands = [_result(computation, name) for name in instruction.operands]
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls") or ""]
        return _fusion_bytes(inner, instruction)
    if opcode in SLICES:
        return 2 * result + sum(operands[1:])
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode == "scatter":
        return 3 * operands[-1]
    if opcode.removesuffix("-start") in SLICES:
        part = instruction.types[len(instruction.operands)]
        return part.bytes + _size(part)
    if opcode.endswith("-start"):
        # Its tuple has the operands, the results, and scalars to wait for.
        return sum(_size(array) for array in instruction.types if array.shape)
    return result + sum(operands)


def _result(computation: Mapping[str, Instruction], name: str) -> int:
    return sum(_size(array) for array in computation[name].types)


def _fusion_bytes(inner: Mapping[str, Instruction], fusion: Instruction) -> int:
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    read = sum(
        _read(instruction, users)
        for instruction in inner.values()
        if instruction.opcode == "parameter"
    )
    root = next(i for i in inner.values() if i.is_root)
    made = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = sum(
        _written(_origin(inner, value), inner, array)
        for value, array in zip(made, fusion.types, strict=False)
    )
    return read + written


def _origin(inner: Mapping[str, Instruction], value: Instruction) -> Instruction:
    while value.opcode in ("bitcast", "get-tuple-element") and value.operands:
        value = inner[value.operands[0]]
    return value


def _is_collective(instruction: Instruction) -> bool:
    return "channel_id=" in instruction.attributes


def _read(parameter: Instruction, users: Mapping[str, list[Instruction]]) -> int:
    """What a fusion reads of one of its parameters."""
    whole = sum(_size(array) for array in parameter.types)
    parts = 0
    waiting = [(parameter.name, user) for user in users.get(parameter.name, [])]
    while waiting:
        name, user = waiting.pop()
        if user.opcode == "bitcast":
            waiting += [(user.name, after) for after in users.get(user.name, [])]
        elif user.opcode in SLICES and user.operands[0] == name:
            parts += sum(array.bytes for array in user.types)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # the rest of it stays where it is
        elif user.opcode == "tuple" or _is_collective(user):
            continue  # it passes through, or a collective reads it by and by
        else:
            return whole
    return min(whole, parts)


def _written(
    value: Instruction, inner: Mapping[str, Instruction], array: ArrayType
) -> int:
    """What a fusion writes of one of its results."""
    if not array.in_memory or value.opcode == "parameter" or _is_collective(value):
        return 0
    if value.opcode == "dynamic-update-slice":
        return sum(part.bytes for part in inner[value.operands[1]].types)
    return padded_bytes(array)
