"""What a checkpoint says of the run that wrote it, and how another run differs."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mtl_jax.sharding.rules import path_name
from mtl_jax.train.integrity import (
    DamagedCheckpointError,
    checked_text,
    saved_steps,
)
from mtl_jax.train.program import Program
from mtl_jax.train.result import versions

MOST = 10
"""How many differences a message names."""


def describe(program: Program, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is kept in each checkpoint besides the state, as JSON.

    Args:
      program: What is run.
      config: Content of ``config.json``; None where there is none.
    """
    experiment = program.experiment
    return {
        "config": config,
        "tasks": [task.name for task in experiment.tasks],
        "rules": dataclasses.asdict(experiment.rules),
        "mesh": dict(program.mesh.shape),
        "versions": versions(),
    }


def saved_config(directory: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The config by which a run's newest checkpoint was trained, and which one that is.

    Checkpoints whose description is damaged are passed over.

    Args:
      directory: The folder of all of them.

    Returns:
      Folder of the checkpoint and content of ``config.json`` then; None if there is no
      checkpoint, or none that knows.

    Raises:
      RunFolderError: If a checkpoint is of a later format, or cannot be read.
    """
    for step in reversed(saved_steps(directory)):
        folder = directory / str(step)
        try:
            text = checked_text(folder, "run/metadata")
        except DamagedCheckpointError:
            continue
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            # Not what we write: it is refused when it is restored.
            return None
        config = document.get("config") if isinstance(document, Mapping) else None
        return (folder, config) if isinstance(config, Mapping) else None
    return None


def task_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How the tasks of two descriptions differ, in words.

    Tasks are told apart by their places: gradients, losses and gates are kept in the
    order of the tasks, and would go to others if that changed, whatever their shapes.

    Args:
      saved: Description in the checkpoint.
      wanted: Description of the run that reads it.
    """
    old, new = saved.get("tasks"), wanted.get("tasks")
    if old is None or new is None or old == new:
        return []
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    lines = []
    if added:
        lines.append(f"the config adds the tasks {', '.join(added)}")
    if removed:
        lines.append(f"the config lacks the tasks {', '.join(removed)}")
    if not lines:
        lines.append(
            f"the tasks are {', '.join(old)} in the checkpoint, and in the config in "
            f"another order: {', '.join(new)}"
        )
    return lines


def config_differences(
    saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[str]:
    """Fields that differ in the configs of two descriptions: ``path: old -> new``."""
    old, new = (
        (description.get("config") or {}).get("fields", {})
        for description in (saved, wanted)
    )
    if not old or not new:
        return []
    return [
        f"{path}: {old.get(path, '(unset)')!r} -> {new.get(path, '(unset)')!r}"
        for path in sorted({*old, *new})
        if old.get(path, ...) != new.get(path, ...)
    ]


def array_types(state: PyTree) -> dict[str, str]:
    """Type and shape of every array by its path; PRNG keys are arrays of integers.

    Args:
      state: Arrays, or their shapes.
    """
    types = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = _numbers_of(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        types[path_name(path)] = f"{jnp.dtype(leaf.dtype)} {tuple(leaf.shape)}"
    return types


@functools.cache
def _numbers_of(key: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # JAX keeps something of every call, and a run saves for weeks.
    return jax.eval_shape(jax.random.key_data, key)


def array_differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Arrays that differ in type or shape, or are in one of two states alone.

    Parameters come first: they tell more than what optimizers keep for each of them.

    Args:
      saved: `array_types` of the checkpoint.
      wanted: `array_types` of the run that reads it.
    """
    different = [
        path for path in {**wanted, **saved} if wanted.get(path) != saved.get(path)
    ]
    return [
        f"{path} is {saved.get(path, 'absent')} in the checkpoint and "
        f"{wanted.get(path, 'absent')} in the config"
        for path in sorted(different, key=lambda path: not path.startswith("params/"))
    ]


def shortened(lines: list[str], most: int = MOST) -> str:
    """Differences in one line, the first ``most`` of them in words."""
    more = [f"and {len(lines) - most} more differ"] if len(lines) > most else []
    return "; ".join(lines[:most] + more)
