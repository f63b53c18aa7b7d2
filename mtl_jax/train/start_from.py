"""Runs that start from the parameters of another run's newest checkpoint."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from mtl_jax.models.experts import only_new
from mtl_jax.sharding.rules import path_name
from mtl_jax.train.run_folder import RunFolderError


def start_from(
    params: PyTree, *, run: str, make: Callable[[PyTree, PyTree], PyTree]
) -> PyTree:
    """Makes the parameters that a run starts from of another run's.

    For an experiment's ``initialize``, as a partial.

    Args:
      params: Fresh parameters ``{"trunk": ..., "heads": ...}``.
      run: Folder of the other run.
      make: Called with the fresh parameters and those of the other run, arrays of the
        host; makes the parameters to start from, such as
        `mtl_jax.models.experts.upcycle` or `mtl_jax.models.experts.extend`.

    Returns:
      What ``make`` returns.

    Raises:
      RunFolderError: If the folder has no checkpoint, or it is damaged.
      ValueError: If the parameters do not fit.
    """
    return make(params, _read(run, shapes_only=False))


def train_new(
    num_steps: int,
    *,
    optimizer: Callable[..., optax.GradientTransformation],
    run: str,
) -> optax.GradientTransformation:
    """An optimizer that leaves what another run has as it is, to the last bit.

    For an experiment's ``optimizer``, as a partial, where ``initialize`` extends the
    other run's parameters by new tasks and experts. It needs the other run's folder
    whenever the experiment is used.

    Args:
      num_steps: Length of the run.
      optimizer: Makes what moves the rest, given ``num_steps``.
      run: Folder of the other run.

    Raises:
      RunFolderError: If the folder has no checkpoint, or it is damaged.
    """
    shapes = {
        path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            _read(run, shapes_only=True)
        )
    }
    return only_new(optimizer(num_steps=num_steps), shapes)


def _read(run: str, *, shapes_only: bool) -> Any:
    """Parameters of the newest checkpoint as arrays of the host, or their shapes."""
    directory = Path(run) / "checkpoints"
    # A checkpoint that is still being written has another name.
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdecimal()]
    if not steps:
        raise RunFolderError(f"{run} has no checkpoints to start from; train it first")
    folder = (directory / str(max(steps)) / "state").absolute()
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            params = checkpointer.metadata(folder).item_metadata.tree["params"]
            if shapes_only:
                return jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params
                )
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params
            )
            return checkpointer.restore(
                folder,
                ocp.args.PyTreeRestore(  # type: ignore[call-arg]
                    item={"params": params},
                    restore_args={"params": as_numpy},
                    partial_restore=True,
                ),
            )["params"]
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise RunFolderError(
            f"the checkpoint {folder.parent} is damaged ({reason}); restore it from a "
            "copy, or delete it to use the one before"
        ) from error
