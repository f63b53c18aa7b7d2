"""The device mesh: four named axes, built by us and never implied."""

import math
from collections.abc import Sequence
from typing import Any

import jax
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
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
