"""Rules: which mesh axes each logical axis of a parameter is sharded over."""

import dataclasses
import difflib
import math
from collections.abc import Collection
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax.sharding.expert_parallel import BATCH_AXES

MeshAxes = str | tuple[str, ...] | None
"""Mesh axes that one array axis is split over, or None where it is not."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of every logical axis name, one field a name.

    Parameters carry their logical names by ``nn.with_logical_partitioning``. A
    misspelt field is a ``TypeError``, and a misspelt name an error of ``spec``.

    Attributes:
      batch: Examples of a batch.
      expert: Experts of a mixture-of-experts layer.
      embed: The width of the trunk.
      mlp: Hidden units of a multilayer perceptron, or of one expert.
      heads: Attention heads.
      kv: Features of one attention head.
      expert_logits: A router's output, one logit an expert.
      task: One entry a task.
      classes: Outputs of a head.
      patch: Pixels of one patch, flattened.
      tokens: Positions of a sequence of tokens.
      layers: Repetitions of layers that are scanned over.
    """

    batch: MeshAxes = ("data", "fsdp", "expert")
    expert: MeshAxes = "expert"
    embed: MeshAxes = "fsdp"
    mlp: MeshAxes = "model"
    heads: MeshAxes = "model"
    kv: MeshAxes = None
    expert_logits: MeshAxes = None
    task: MeshAxes = None
    classes: MeshAxes = None
    patch: MeshAxes = None
    tokens: MeshAxes = None
    layers: MeshAxes = None

    def as_flax_rules(self) -> tuple[tuple[str, MeshAxes], ...]:
        """The rules as ``nn.logical_axis_rules`` takes them."""
        return tuple(
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
        )


def check_rules(rules: Rules, axes: Collection[str]) -> None:
    """Checks that every rule names axes that there are, and each once.

    Args:
      rules: The rules.
      axes: Names of the mesh axes.

    Raises:
      ValueError: If a rule names another axis or one twice, or ``batch`` an axis whose
        devices hold the same examples.
    """
    for field in dataclasses.fields(rules):
        entry = getattr(rules, field.name)
        used = mesh_axes(entry)
        allowed = [a for a in axes if field.name != "batch" or a in BATCH_AXES]
        if not set(used) <= set(allowed) or len(set(used)) < len(used):
            raise ValueError(
                f"rules.{field.name} is {entry!r}; choose from the mesh axes "
                f"{', '.join(allowed)}, each at most once, or None"
            )


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec, as a tuple."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def spec(rules: Rules, names: tuple[str | None, ...]) -> PartitionSpec:
    """Translates an array's logical axis names to a partition spec.

    Args:
      rules: The rules to apply.
      names: One logical name an array axis; None leaves that axis whole.

    Returns:
      A spec with one entry a name.

    Raises:
      ValueError: If a name is not a field of ``rules``, or a mesh axis would be used
        for two axes of the array.
    """
    known = [field.name for field in dataclasses.fields(rules)]
    for name in names:
        if name is not None and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"logical axis {name!r} of {names} is not a field of "
                f"{type(rules).__name__}; did you mean {nearest!r}?"
            )
    entries = [None if name is None else getattr(rules, name) for name in names]
    used = [axis for entry in entries for axis in mesh_axes(entry)]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ValueError(
            f"logical axes {names} would use mesh axis {twice[0]!r} twice (spec "
            f"{tuple(entries)}); map one of them to another mesh axis or to None."
        )
    return PartitionSpec(*entries)


def is_boxed(leaf: Any) -> bool:
    """Whether ``leaf`` is a value with its logical axis names around it."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def leaf_spec(path: str, leaf: Any, mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The spec of one variable, checked against its shape.

    Args:
      path: The variable's path, for messages.
      leaf: An array or ``ShapeDtypeStruct``, with or without its logical names.
        Without them it is replicated.
      mesh: The mesh to shard over.
      rules: The rules to apply.

    Raises:
      ValueError: If names and shape differ in length, a mesh axis is absent from the
        mesh, or an axis of the array does not divide over its mesh axes.
    """
    if not is_boxed(leaf):
        return PartitionSpec()
    shape = leaf.value.shape
    if len(leaf.names) != len(shape):
        raise ValueError(
            f"parameter {path} of shape {shape} has {len(leaf.names)} logical axis "
            f"names {leaf.names}; give it one name an axis."
        )
    try:
        partition = spec(rules, leaf.names)
    except ValueError as error:
        raise ValueError(f"parameter {path}: {error}") from error
    for size, name, entry in zip(shape, leaf.names, partition, strict=True):
        absent = [axis for axis in mesh_axes(entry) if axis not in mesh.shape]
        if absent:
            raise ValueError(
                f"parameter {path}: the rule {name}={entry!r} names mesh axis "
                f"{absent[0]!r}, but the mesh has {tuple(mesh.shape)}."
            )
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes(entry))
        if size % parts:
            raise ValueError(
                f"parameter {path} of shape {shape}: axis {name!r} of size {size} "
                f"does not divide over mesh axis {entry!r} of size {parts}; change "
                f"the size, the mesh, or the rule {name}."
            )
    return partition


def path_name(path: tuple[Any, ...]) -> str:
    """A variable's path as ``params/block/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(variables: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings with which variables are born and kept.

    Use as ``jax.jit(init, out_shardings=param_shardings(jax.eval_shape(init, ...)))``
    around an ``init`` that unboxes its result by ``nn.unbox``.

    Args:
      variables: A pytree of arrays or ``ShapeDtypeStruct``, those with logical names
        boxed in ``nn.LogicallyPartitioned`` as ``init`` returns them.
      mesh: The mesh to shard over.
      rules: The rules to apply.

    Returns:
      The same tree, unboxed, with a ``NamedSharding`` for each array. Arrays without
      logical names are replicated.

    Raises:
      ValueError: If a parameter's names are unknown or its shape does not divide over
        the mesh; the message names the parameter, its shape and the axis.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, leaf_spec(path_name(path), leaf, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, variables, is_leaf=is_boxed)
