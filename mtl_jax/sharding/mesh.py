"""The device mesh: four named axes, built by us and never implied."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "model")
"""Every mesh has these axes, in this order; an unused one has size 1."""


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    model: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Builds a mesh with the axes ``data, fsdp, expert, model``.

    Enter it with ``jax.set_mesh``: under the older ``with mesh:`` Linen's logical
    constraints are silently ignored.

    Args:
      data: Copies of the model that see different examples, parameters replicated.
      fsdp: Devices over which parameters are sharded and gathered when used. They see
        different examples too.
      expert: Devices over which experts are distributed; tokens travel to them. They
        see different examples too.
      model: Devices that share each layer's hidden units and heads.
      devices: The devices to use, all of ``jax.devices()`` by default.

    One size may be -1: it takes all the devices that the others leave.

    Returns:
      A mesh whose axes are all of type ``Auto``, since Linen's logical constraints
      fail on ``Explicit`` ones.

    Raises:
      ValueError: If a size is neither positive nor -1, two are -1, or the sizes do
        not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "model": model}
    described = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"mesh sizes {described} must be positive; one may be -1 to be inferred."
        )
    inferred = [name for name, size in sizes.items() if size == -1]
    if len(inferred) > 1:
        raise ValueError(
            f"mesh sizes {described} leave more than one axis to be inferred; "
            "give all but one."
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if inferred:
        sizes[inferred[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh sizes {described} do not divide {len(devices)} devices: their "
            f"product is {known}; choose sizes that multiply to {len(devices)}."
        )
    shape = tuple(sizes.values())
    grid = None
    if sizes["expert"] > 1:
        grid = _with_compact_experts(shape, devices)
    if grid is None:
        grid = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _with_compact_experts(
    shape: tuple[int, ...], devices: Sequence[Any]
) -> np.ndarray | None:
    """The devices of a TPU slice, those that share experts as close as can be.

    Tokens travel between any two of them, and half of them through the middle of where
    they lie: in a cube of 2 x 2 x 2 chips four links lead through it, along a side of 8
    one or two. JAX prefers whole sides. Sizes of the other axes, whose collectives go
    round in rings, take whole sides here too, of what is left.

    Args:
      shape: Sizes of the mesh axes.
      devices: All devices.

    Returns:
      The devices in that shape; None where they are no box of chips with one device
      each, or it cannot be divided so.
    """
    if any(getattr(device, "coords", None) is None for device in devices):
        return None
    places = np.array([device.coords for device in devices])
    places -= places.min(axis=0)
    sides = places.max(axis=0) + 1
    if math.prod(sides) != len(devices) or len(np.unique(places, axis=0)) < len(places):
        return None
    slice_ = np.empty(sides, object)
    slice_[tuple(places.T)] = devices
    left = tuple(int(side) for side in sides)
    blocks = []
    for name, size in reversed([*zip(AXES, shape, strict=True)]):
        choices = [
            block
            for block in itertools.product(*(_divisors(side) for side in left))
            if math.prod(block) == size
        ]
        if not choices:
            return None
        # The longest side decides, then the next.
        choices.sort(key=lambda block: sorted(block, reverse=True))
        block = choices[0 if name in ("expert", "model") else -1]
        blocks.append(block)
        left = tuple(side // part for side, part in zip(left, block, strict=True))
    blocks.reverse()
    # Every side splits into a part for each mesh axis, which then come together.
    parts = [block[side] for side in range(len(sides)) for block in blocks]
    order = [
        side * len(blocks) + axis
        for axis in range(len(blocks))
        for side in range(len(sides))
    ]
    return slice_.reshape(parts).transpose(order).reshape(shape)


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
