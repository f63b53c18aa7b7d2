"""The text of a compiled program, read into instructions, with how often each runs.

The text is that of ``compiled.as_text()``: XLA's HLO after all passes, for one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

BITS = {
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
    "token": 0,
    "opaque": 0,
}

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=?]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """Type of an array.

    Attributes:
      dtype: Name of the type of its elements.
      shape: Its shape.
      layout: The text of its layout, such as ``1,0:T(8,128)S(1)``.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        bits = 8 if self.dtype.startswith("f8") else BITS[self.dtype]
        return math.ceil(math.prod(self.shape) * bits / 8)

    @property
    def in_memory(self) -> bool:
        """Whether it lies in the chip's main memory: other spaces are on the chip."""
        return not re.search(r"S\([1-9]", self.layout)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: Its name, unique in its computation.
      types: Types of the arrays that it makes; several where it makes a tuple.
      opcode: What it does.
      operands: Names of the instructions that it takes.
      arguments: The text between the parentheses, such as the value of a constant.
      attributes: The text behind them.
      is_root: Whether it makes the result of its computation.
    """

    name: str
    types: tuple[ArrayType, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Bytes of what it makes."""
        return sum(array.bytes for array in self.types)

    def called(self, key: str) -> str | None:
        """Name of the computation in an attribute such as ``body=``."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: Name -> instructions by name, in order.
      entry: Name of the computation that the program begins with.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    Args:
      text: From ``compiled.as_text()``.

    Raises:
      ValueError: If it is no such text.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    type_text, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    arguments = rest[start + 1 : end - 1]
    return Instruction(
        name=name,
        types=array_types(type_text),
        opcode=rest[:start],
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[end:],
        is_root=is_root,
    )


def array_types(text: str) -> tuple[ArrayType, ...]:
    """The types of the arrays in the text of a type, in order."""
    return tuple(
        ArrayType(
            dtype,
            tuple(int(size.lstrip("<=?")) for size in shape.split(",") if size),
            layout,
        )
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Position behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
            if depth == 0:
                return position + 1
    raise ValueError(f"the text is no HLO module: it has no end of {text[:80]!r}")


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction that the program executes.

    Attributes:
      instruction: The instruction.
      computation: The instructions of its computation by name.
      times: How often it runs in one run of the program.
      fused: Whether it is a part of a fusion, whose inner values never reach memory.
      asynchronous: Whether the program goes on while it runs.
    """

    instruction: Instruction
    computation: Mapping[str, Instruction]
    times: int
    fused: bool
    asynchronous: bool


def visits(module: Module) -> Iterator[Visit]:
    """All instructions that are executed, with bodies of loops and of fusions.

    The body of a loop runs as often as `trip_count` says. Every branch of a conditional
    is visited as if it were taken.
    """
    return _visits(module, module.entry, 1, False, False)


def _visits(
    module: Module, name: str, times: int, fused: bool, asynchronous: bool
) -> Iterator[Visit]:
    computation = module.computations[name]
    for instruction in computation.values():
        yield Visit(instruction, computation, times, fused, asynchronous)
        for inner, count, is_fusion, goes_on in _inner(
            module, computation, instruction
        ):
            yield from _visits(
                module,
                inner,
                times * count,
                fused or is_fusion,
                asynchronous or goes_on,
            )


def _inner(
    module: Module, computation: Mapping[str, Instruction], instruction: Instruction
) -> Iterator[tuple[str, int, bool, bool]]:
    """Computations that an instruction runs: name, times, whether fused, whether async.

    What a reduction or a sort applies to single elements is left out.
    """
    opcode = instruction.opcode
    if opcode == "while":
        body = instruction.called("body")
        assert body
        yield body, trip_count(module, computation, instruction), False, False
    elif opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        found = _NAME.findall(branches[1]) if branches else []
        for key in ("true_computation", "false_computation"):
            found += [branch] if (branch := instruction.called(key)) else []
        for branch in found:
            yield branch, 1, False, False
    elif opcode in ("call", "fusion", "async-start"):
        name = instruction.called("calls") or instruction.called("to_apply")
        if name:
            yield name, 1, opcode == "fusion", opcode == "async-start"


def trip_count(
    module: Module, computation: Mapping[str, Instruction], loop: Instruction
) -> int:
    """How often the body of a ``while`` runs.

    XLA for CPU and GPU writes it down. Where it is not written, as for TPU, it follows
    from the constant that the condition compares with, the first value of the counter
    and its step. Where the condition compares with no constant, as the number of
    iterations depends on values, one is returned.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition, body = loop.called("condition"), loop.called("body")
    assert condition
    assert body
    comparison = _comparison(module, module.computations[condition])
    if comparison is None:
        return 1
    index, limit, strict = comparison
    first = _integer(computation, _element(computation, loop.operands[0], index)) or 0
    step = _step(module.computations[body], index)
    distance = abs(limit - first) + (0 if strict else 1)
    return max(1, math.ceil(distance / step))


def _comparison(
    module: Module, condition: Mapping[str, Instruction]
) -> tuple[int, int, bool] | None:
    """Index of the counter in the loop's state, its limit, whether it stays below."""
    root = next(i for i in condition.values() if i.is_root)
    outer: Mapping[str, Instruction] = condition
    inner, arguments = condition, {}
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls") or ""]
        arguments = {
            i.name: root.operands[int(i.arguments)]
            for i in inner.values()
            if i.opcode == "parameter"
        }
        root = next(i for i in inner.values() if i.is_root)
    if root.opcode != "compare":
        return None
    index, limit = None, None
    for operand in root.operands:
        name, scope = operand, inner
        if operand in arguments:
            name, scope = arguments[operand], outer
        value = _integer(scope, name)
        limit = value if value is not None else limit
        source = _through_copies(scope, name)
        if source is not None and source.opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", source.attributes)[1])  # type: ignore[index]
    if index is None or limit is None:
        return None
    return index, limit, not re.search(r"direction=(LE|GE)", root.attributes)


def _through_copies(
    computation: Mapping[str, Instruction], name: str | None
) -> Instruction | None:
    instruction = computation.get(name or "")
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _integer(computation: Mapping[str, Instruction], name: str | None) -> int | None:
    source = _through_copies(computation, name)
    if source is None or source.opcode != "constant":
        return None
    return int(source.arguments) if re.fullmatch(r"-?\d+", source.arguments) else None


def _element(
    computation: Mapping[str, Instruction], name: str, index: int
) -> str | None:
    source = _through_copies(computation, name)
    if source is None or source.opcode != "tuple":
        return None
    return source.operands[index]


def _step(body: Mapping[str, Instruction], index: int) -> int:
    root = next(i for i in body.values() if i.is_root)
    if root.opcode != "tuple":
        return 1
    update = _through_copies(body, root.operands[index])
    if update is None or update.opcode != "add":
        return 1
    constants = [_integer(body, operand) for operand in update.operands]
    return next((abs(c) for c in constants if c), 1)
