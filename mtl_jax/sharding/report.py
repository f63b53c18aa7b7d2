"""The sharding report: what lies where, how large it is, and what is replicated why."""

import dataclasses
import hashlib
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mtl_jax.sharding.rules import Rules, is_boxed, leaf_spec, mesh_axes, path_name


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter's line in the report.

    Attributes:
      path: The parameter's path, such as ``params/head/kernel``.
      shape: Its global shape.
      dtype: Its dtype's name.
      spec: Its partition spec.
      total_bytes: Bytes of the whole array.
      bytes_per_device: Bytes of one device's shard.
      note: Why every device holds all of it; empty where it is sharded.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    total_bytes: int
    bytes_per_device: int
    note: str


def report(variables: Any, mesh: Mesh, rules: Rules) -> list[Row]:
    """Describes how variables are sharded.

    Args:
      variables: A pytree of arrays or ``ShapeDtypeStruct`` with their logical names
        boxed around them, as ``jax.eval_shape(init, ...)`` returns it.
      mesh: The mesh to shard over.
      rules: The rules to apply.

    Returns:
      One row an array, in the order of the tree.

    Raises:
      ValueError: As ``param_shardings``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=is_boxed)
    return [_row(path_name(path), leaf, mesh, rules) for path, leaf in leaves]


def _row(path: str, leaf: Any, mesh: Mesh, rules: Rules) -> Row:
    partition = leaf_spec(path, leaf, mesh, rules)
    array = leaf.value if is_boxed(leaf) else leaf
    axes = [axis for entry in partition for axis in mesh_axes(entry)]
    parts = math.prod(mesh.shape[axis] for axis in axes)
    total = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    note = ""
    if not is_boxed(leaf):
        note = "replicated: no logical axis names"
    elif not axes:
        names = ", ".join(str(name) for name in leaf.names)
        note = f"replicated: no rule shards {names or 'a scalar'}"
    elif parts == 1:
        note = f"replicated: mesh axis {', '.join(axes)} has size 1"
    return Row(
        path=path,
        shape=tuple(array.shape),
        dtype=np.dtype(array.dtype).name,
        spec=partition,
        total_bytes=total,
        bytes_per_device=total // parts,
        note=note,
    )


def format_report(rows: list[Row]) -> str:
    """Lays out rows as an aligned text table with the totals below.

    The last line tells the bytes of all arrays, those that one device holds, and how
    many of the latter are replicated.
    """
    heading = ("parameter", "shape", "dtype", "spec", "bytes/device", "note")
    cells = [
        (
            row.path,
            "×".join(map(str, row.shape)) or "scalar",
            row.dtype,
            _format_spec(row.spec),
            f"{row.bytes_per_device:,}",
            row.note,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heading, *cells, strict=True)]
    lines = []
    for line in (heading, *cells):
        padded = [
            cell.rjust(width) if name == "bytes/device" else cell.ljust(width)
            for name, cell, width in zip(heading, line, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    total = sum(row.total_bytes for row in rows)
    device = sum(row.bytes_per_device for row in rows)
    replicated = sum(row.bytes_per_device for row in rows if row.note)
    lines.append(
        f"total {total:,} bytes; {device:,} bytes/device, of them {replicated:,} "
        "replicated"
    )
    return "\n".join(lines)


def _format_spec(spec: PartitionSpec) -> str:
    return "(" + ", ".join("+".join(mesh_axes(entry)) or "-" for entry in spec) + ")"


def digest(rows: list[Row]) -> str:
    """A short hash of paths, shapes, dtypes, specs and bytes, for tests to hold.

    It depends neither on the order of the rows nor on the wording of notes.
    """
    lines = sorted(
        f"{row.path} {row.shape} {row.dtype} {_format_spec(row.spec)} "
        f"{row.bytes_per_device}"
        for row in rows
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
