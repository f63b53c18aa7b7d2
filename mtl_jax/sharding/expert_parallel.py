"""Expert parallelism: each device routes its own tokens, then sends them to experts.

Everything here is the identity of the arrays as a whole and only moves their shards,
so a layer written with it computes the same on any mesh, and on none.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which routing groups are split."""

EXPERT_AXIS = "expert"
"""Mesh axis over which experts are split."""


def axis_sizes() -> dict[str, int]:
    """Sizes of the mesh axes that hold different examples and that we may use.

    An axis that is manual already (inside ``jax.shard_map`` or ``jax.pmap``) is not
    ours to map again: the code runs on that device's part alone.
    """
    mesh: AbstractMesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {
        axis: mesh.shape[axis]
        for axis in BATCH_AXES
        if axis in types and types[axis] is not AxisType.Manual and mesh.shape[axis] > 1
    }


def platform() -> str:
    """Platform of the mesh now set, such as ``"tpu"``, or JAX's default without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def num_expert_parts() -> int:
    """Parts that experts are split into on the mesh now set."""
    return axis_sizes().get(EXPERT_AXIS, 1)


def splits_within_experts() -> bool:
    """Whether some mesh axis splits other things than examples and experts."""
    mesh: AbstractMesh = jax.sharding.get_abstract_mesh()
    return any(
        mesh.shape[axis] > 1 for axis in mesh.axis_names if axis not in BATCH_AXES
    )


def _unused_axes() -> set[str]:
    """Mesh axes of size 1. Kernels written in Pallas want no axis left to XLA."""
    mesh: AbstractMesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {
        axis
        for axis, size in mesh.shape.items()
        if size == 1 and types[axis] is not AxisType.Manual
    }


def _shard_map(function: Callable[..., Any], in_specs: Any, out_specs: Any):
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)


def check_divisible(*, num_groups: int, num_experts: int) -> None:
    """Checks that the mesh now set can split routing groups and experts.

    Args:
      num_groups: Routing groups in the whole batch.
      num_experts: Number of experts.

    Raises:
      ValueError: If either does not divide; the message names the sizes.
    """
    sizes = axis_sizes()
    parts = math.prod(sizes.values())
    if num_groups % parts:
        raise ValueError(
            f"the batch has {num_groups} routing groups, which do not divide over "
            f"mesh axes {sizes} with {parts} devices; make batch / group_size a "
            f"multiple of {parts}."
        )
    expert = sizes.get(EXPERT_AXIS, 1)
    if num_experts % expert:
        raise ValueError(
            f"num_experts={num_experts} does not divide over mesh axis "
            f"{EXPERT_AXIS!r} of size {expert}; choose a multiple of {expert}."
        )


def map_groups(
    function: Callable[..., Any], *, in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
    """Runs a function on every device's own routing groups.

    Left to itself, the partitioner gathers all tokens on every device where rows are
    taken by computed indices. The function must treat groups independently.

    Args:
      function: Takes arrays, returns a pytree of arrays.
      in_axes: For each argument, the axis along which groups lie; for an argument
        that is a pytree, a prefix of it, as for ``jax.vmap``.
      out_axes: The same for the output.

    Returns:
      A function of the whole arrays. It is ``function`` itself where the mesh now set
      does not split groups.
    """
    axes = tuple(axis_sizes())
    if not axes:
        return function

    def along(axis: int) -> PartitionSpec:
        return PartitionSpec(*(None,) * axis, axes)

    return _shard_map(
        function,
        in_specs=jax.tree.map(along, in_axes),
        out_specs=jax.tree.map(along, out_axes),
    )


def _summable(array: Array) -> Array:
    """The array in a dtype that `map_experts` can add up over devices.

    XLA for CPUs aborts at sums in bfloat16 over some axes of a mesh where
    `jax.shard_map` leaves another one to it (JAX 0.10.1).
    """
    aborts = platform() == "cpu" and splits_within_experts()
    narrow = array.dtype == jnp.bfloat16
    return array.astype(jnp.float32) if aborts and narrow else array


def map_experts(
    function: Callable[..., Any], *, gather: bool = True
) -> Callable[..., Any]:
    """Runs a function on every device's own experts.

    With ``gather``, on the groups of all devices that share the experts: groups are
    gathered over mesh axis ``expert``; outputs are added up over it and scattered
    again. This needs no capacity, and beats `exchange` where tokens have as many copies
    as there are parts. Without, on the device's own groups, whose rows the function has
    to exchange itself.

    Args:
      function: ``(parameters, *arrays) -> arrays``, with the experts in front in every
        leaf of ``parameters`` and groups in front in all others. It sees its part of
        the experts alone, whose first is ``expert_part() · experts``, and gives zero
        for what other experts do.
      gather: Whether to gather and scatter.

    Returns:
      The same function of the whole arrays, and ``function`` itself where the mesh now
      set splits neither.
    """
    sizes = axis_sizes()
    if not sizes:
        return function
    axes = tuple(sizes)
    shares = EXPERT_AXIS in sizes

    def mapped(parameters: Any, *arrays: Any) -> Any:
        dtypes = jax.tree.map(lambda a: a.dtype, (parameters, arrays))

        def local(parameters: Any, *arrays: Any) -> Any:
            if shares and gather:
                arrays = jax.tree.map(
                    lambda a: jax.lax.all_gather(a, EXPERT_AXIS, tiled=True), arrays
                )
            parameters, arrays = jax.tree.map(
                jax.lax.convert_element_type, (parameters, arrays), dtypes
            )
            output = function(parameters, *arrays)
            if not (shares and gather):
                return output
            return jax.tree.map(
                lambda a: jax.lax.psum_scatter(
                    _summable(a), EXPERT_AXIS, tiled=True
                ).astype(a.dtype),
                output,
            )

        by_expert = PartitionSpec(EXPERT_AXIS if shares else None)
        by_group = PartitionSpec(axes)
        return jax.shard_map(
            local,
            in_specs=(by_expert, *(by_group,) * len(arrays)),
            out_specs=by_group,
            # Hidden units stay split over other axes.
            axis_names=set(axes) | _unused_axes(),
            # Kernels written in Pallas do not say over which axes they vary.
            check_vma=False,
            # The gradients of what several devices have are sums as well.
        )(*jax.tree.map(_summable, (parameters, *arrays)))

    return mapped


def expert_part() -> Array | int:
    """Which part of the experts this device has, inside `map_experts`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or EXPERT_AXIS not in mesh.manual_axes:
        return 0
    return jax.lax.axis_index(EXPERT_AXIS)


def exchange(
    buffers: Float[Array, "experts groups capacity width"],
) -> Float[Array, "experts groups capacity width"]:
    """Sends every expert's buffers to the device that holds the expert.

    One ``all_to_all`` over mesh axis ``expert``: from groups split over all batch axes
    and experts whole, to experts split over ``expert`` and groups over the rest. Its
    transpose is ``exchange_back``.
    """
    return _swap(buffers, to_experts=True)


def exchange_back(
    buffers: Float[Array, "experts groups capacity width"],
) -> Float[Array, "experts groups capacity width"]:
    """Sends experts' outputs back to the devices of their tokens."""
    return _swap(buffers, to_experts=False)


def _swap(buffers: Array, *, to_experts: bool) -> Array:
    axes = tuple(axis_sizes())
    if EXPERT_AXIS not in axes:
        return buffers
    rest = tuple(axis for axis in axes if axis != EXPERT_AXIS)
    by_group = PartitionSpec(None, axes)
    by_expert = PartitionSpec(EXPERT_AXIS, rest)
    split, concatenate = (0, 1) if to_experts else (1, 0)

    def all_to_all(shard: Array) -> Array:
        return jax.lax.all_to_all(shard, EXPERT_AXIS, split, concatenate, tiled=True)

    specs = (by_group, by_expert) if to_experts else (by_expert, by_group)
    return _shard_map(all_to_all, in_specs=specs[0], out_specs=specs[1])(buffers)
