"""Runs that start from the parameters of another run's newest checkpoint."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from mtl_jax.models import VisionTransformer
from mtl_jax.models.experts import expert_layers, extend, only_new
from mtl_jax.models.experts.blocks import by_block
from mtl_jax.models.transfer import print_account
from mtl_jax.sharding.rules import path_name
from mtl_jax.train.array_sizes import array_sizes_checked
from mtl_jax.train.integrity import (
    DamagedCheckpointError,
    check_contents,
    check_files,
    saved_steps,
)
from mtl_jax.train.run_folder import RunFolderError, refuse_links


def start_from(
    params: PyTree, *, run: str, make: Callable[[PyTree, PyTree], PyTree]
) -> PyTree:
    """Makes the parameters that a run starts from of another run's.

    For an experiment's ``initialize``, as a partial. It takes the newest checkpoint
    that is whole, and prints which one that is, which are damaged, which parameters the
    run starts from and which stay fresh.

    It takes parameters alone. What the other run's trunk keeps besides, such as the
    biases of `mtl_jax.layers.moe.routers.LossFree`, would start anew and send tokens to
    other experts, so that such a run is refused. The new run's own trunk may keep what
    it likes: an upcycled one starts with fresh biases, as it should.

    Args:
      params: Fresh parameters ``{"trunk": ..., "heads": ...}``.
      run: Folder of the other run.
      make: Called with the fresh parameters and those of the other run, arrays of the
        host; makes the parameters to start from, such as
        `mtl_jax.models.experts.upcycle`, `mtl_jax.models.experts.extend` or a partial
        `mtl_jax.models.transfer.transfer`.

    Returns:
      What ``make`` returns.

    Raises:
      RunFolderError: If the folder has no checkpoint that is whole.
      ValueError: If the parameters do not fit, or the other run's trunk keeps more than
        parameters.
    """
    origin, saved = _read(run, shapes_only=False)
    made = make(params, saved)
    print_account(origin, params, saved, made)
    return made


def train_new(
    num_steps: int,
    *,
    optimizer: Callable[..., optax.GradientTransformation],
    run: str,
) -> optax.GradientTransformation:
    """An optimizer that leaves what another run has as it is, to the last bit.

    For an experiment's ``optimizer``, as a partial, where ``initialize`` extends the
    other run's parameters by new tasks and experts. It needs the other run's folder
    whenever the experiment is used. It holds parameters alone: a run whose trunk keeps
    more, which would go on moving, is refused.

    Args:
      num_steps: Length of the run.
      optimizer: Makes what moves the rest, given ``num_steps``.
      run: Folder of the other run.

    Raises:
      RunFolderError: If the folder has no checkpoint that is whole.
      ValueError: If the other run's trunk keeps more than parameters.
    """
    shapes = {
        path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            _read(run, shapes_only=True)[1]
        )
    }
    return only_new(optimizer(num_steps=num_steps), shapes)


def check_growth(initialize: Any, trunk: Any) -> None:
    """Checks that experts which a run adds leave the others' tokens where they are.

    An expert with a capacity takes fewer tokens the more experts there are.

    Args:
      initialize: Of an experiment; only a partial `start_from` with `extend` is looked
        at.
      trunk: Of the experiment; only a `VisionTransformer` is looked at.

    Raises:
      RunFolderError: If the other run has no checkpoint that is whole.
      ValueError: If a layer has a capacity and more experts than in the other run.
    """
    grows = (
        isinstance(initialize, functools.partial)
        and initialize.func is start_from
        and initialize.keywords.get("make") is extend
    )
    if not grows or not isinstance(trunk, VisionTransformer):
        return
    limited = [
        layer for layer in expert_layers(trunk) if layer.capacity_factor is not None
    ]
    if not limited:
        return
    saved = _read(initialize.keywords["run"], shapes_only=True)[1]["trunk"]
    blocks = jax.eval_shape(by_block, saved)
    for layer in limited:
        there = blocks.get(f"block_{layer.block}", {}).get(layer.kind, {})
        # A model of other blocks is refused by `extend`.
        sizes = {leaf.shape[0] for leaf in jax.tree.leaves(there.get("experts", {}))}
        if sizes - {layer.num_experts}:
            raise ValueError(
                f"capacity_factor is {layer.capacity_factor} in {layer.name}, which "
                f"has {min(sizes)} experts in {initialize.keywords['run']} and "
                f"{layer.num_experts} here; an expert would take fewer tokens the more "
                "experts there are, and predictions of old tasks change: train both "
                "runs with capacity_factor=None and a router by which tokens choose, "
                "or add no experts"
            )


def _read(run: str, *, shapes_only: bool) -> tuple[str, Any]:
    """Parameters of the newest checkpoint that is whole, and which one that is.

    They are arrays of the host, or their shapes; for these, the files with the arrays
    are not checked. A ValueError if the run keeps more than parameters.
    """
    directory = Path(run) / "checkpoints"
    refuse_links(directory, "*")
    listed = saved_steps(directory)
    if not listed:
        raise RunFolderError(f"{run} has no checkpoints to start from; train it first")
    damaged, left = [], [*listed]
    while left:
        step = left.pop()
        folder = directory / str(step)
        try:
            with array_sizes_checked(folder):
                large = check_files(folder)
                if not shapes_only:
                    check_contents(folder, large)
            read = _restore(run, folder, shapes_only=shapes_only)
        except (OSError, ValueError) as error:
            # The other run may be training, and delete what it has replaced.
            now = saved_steps(directory)
            if now and now[-1] != listed[-1]:
                listed, left, damaged = now, [*now], []
                continue
            if not isinstance(error, DamagedCheckpointError):
                raise
            damaged.append(f"the checkpoint {folder} is damaged ({error.reason})")
            continue
        return "; ".join([f"step {step} of {run}", *damaged]), read
    raise RunFolderError(
        f"{'; '.join(damaged)}, and there is no other to start from; restore one from "
        "a copy, or train the run again"
    )


def _restore(run: str, folder: Path, *, shapes_only: bool) -> Any:
    state = (folder / "state").absolute()
    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(state).item_metadata.tree
        collections = {
            name: kept
            for name, kept in (tree.get("collections") or {}).items()
            if jax.tree.leaves(kept)
        }
        if collections:
            names = ", ".join(map(repr, collections))
            raise ValueError(
                f"run is {run!r}, whose trunk keeps {names} besides its parameters, "
                "and a run that starts from it takes parameters alone; start from a "
                "run with a router that keeps nothing besides, which is any but "
                "LossFree"
            )
        params = tree["params"]
        if shapes_only:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params
            )
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params
        )
        return checkpointer.restore(
            state,
            ocp.args.PyTreeRestore(  # type: ignore[call-arg]
                item={"params": params},
                restore_args={"params": as_numpy},
                partial_restore=True,
            ),
        )["params"]
