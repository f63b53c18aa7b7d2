"""Operations of the matrix products that one device executes.

What is counted here has been through the partitioner, unlike what is counted from the
traced step: a product that every device computes for itself counts on each of them.
"""

import math
import re

from mtl_jax.scaling.hlo import Module, Visit, visits


def device_flops(module: Module) -> int:
    """Multiplications and additions of one device in a step.

    Those in custom calls, such as kernels written in Pallas, cannot be seen.
    """
    return sum(visit.times * _flops(visit) for visit in visits(module))


def _flops(visit: Visit) -> int:
    if visit.instruction.opcode == "dot":
        return _dot_flops(visit)
    if visit.instruction.opcode == "convolution":
        return _convolution_flops(visit)
    return 0


def _dot_flops(visit: Visit) -> int:
    instruction = visit.instruction
    left = visit.computation[instruction.operands[0]].types[0].shape
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [int(axis) for axis in match[1].split(",") if axis] if match else []
    depth = math.prod(left[axis] for axis in contracted)
    return 2 * depth * math.prod(instruction.types[0].shape)


def _convolution_flops(visit: Visit) -> int:
    """XLA for TPU writes every product as a convolution, batches as spatial axes.

    Windows are then spread out so far that most of their positions hold padding, and
    these are left out.
    """
    instruction = visit.instruction
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels
    arrays = (
        *(visit.computation[name].types[0].shape for name in instruction.operands[:2]),
        instruction.types[0].shape,
    )
    left, kernel, out = (
        dict(zip(text, shape, strict=True))
        for text, shape in zip(labels.groups(), arrays, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(axis for axis in left if axis.isdigit())

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    pairs = 1
    for axis, stride, pad, spread, kernel_spread in zip(
        spatial,
        values("stride", "1"),
        values("pad", "0_0"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        strict=True,
    ):
        pairs *= _pairs(
            left[axis],
            kernel[axis],
            out[axis],
            stride=int(stride),
            before=int(pad.split("_")[0]),
            spread=int(spread),
            kernel_spread=int(kernel_spread),
        )
    return 2 * out["b"] * out["f"] * kernel["i"] * pairs


def _pairs(
    left: int,
    kernel: int,
    out: int,
    *,
    stride: int,
    before: int,
    spread: int,
    kernel_spread: int,
) -> int:
    """Pairs of an output and a kernel position that meet an element along one axis."""
    return sum(
        place % spread == 0 and 0 <= place // spread < left
        for position in range(out)
        for place in (
            position * stride + offset * kernel_spread - before
            for offset in range(kernel)
        )
    )
