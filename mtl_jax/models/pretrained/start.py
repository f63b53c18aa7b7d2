"""A training run that starts from a published trunk."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from mtl_jax.layers.patch import resize_positions
from mtl_jax.models.pretrained.mapping import Pretrained
from mtl_jax.models.transfer import print_account


def warm_start(
    params: Mapping[str, Any], *, load: Callable[[], Pretrained]
) -> Mapping[str, Any]:
    """Parameters with a published trunk in place of the fresh one.

    For an experiment's ``initialize``, as a partial with ``load``. Heads stay fresh.
    Positions are resized to the ``position_grid`` of the trunk, and its blocks stacked
    where it loops over them by ``scan``. Which parameters are the published ones, which
    were resized and which stay fresh is printed.

    Args:
      params: Fresh parameters ``{"trunk": ..., "heads": ...}``.
      load: Makes the published trunk, such as a partial `load_huggingface`.

    Returns:
      The parameters.

    Raises:
      ValueError: If the trunk has other parameters or other sizes than the published
        one, or that cannot be loaded; the message lists the parameters.
      OSError: If a file is missing.
    """
    pretrained = load()
    published: dict[str, Any] = dict(_flat(pretrained.params))
    trunk = _flat(params["trunk"])
    if "blocks" in params["trunk"]:
        published = _stacked(published, len(params["trunk"]["blocks"]))
    if "positions" in published and "positions" in trunk:
        grid = trunk["positions"].shape[:2]
        if grid != published["positions"].shape[:2]:
            published["positions"] = resize_positions(
                jnp.asarray(published["positions"]),
                *grid,
                antialias=pretrained.trunk.antialias_positions,
            )
    faults = {
        "the file lacks": [path for path in trunk if path not in published],
        "the trunk lacks": [path for path in published if path not in trunk],
        "of other sizes": [
            f"{path} ({published[path].shape} in the file, {leaf.shape} in the trunk)"
            for path, leaf in trunk.items()
            if path in published and published[path].shape != leaf.shape
        ],
    }
    found = "; ".join(
        f"{kind}: {', '.join(paths)}" for kind, paths in faults.items() if paths
    )
    if found:
        raise ValueError(
            f"the trunk is not the published one; {found}; take the fields of the "
            "trunk from what load returns, in its field trunk"
        )
    fitted = {path: published[path].astype(leaf.dtype) for path, leaf in trunk.items()}
    made = {**params, "trunk": flax.traverse_util.unflatten_dict(fitted, sep="/")}
    print_account("a published trunk", params, {"trunk": pretrained.params}, made)
    return made


def _stacked(published: Mapping[str, Any], period: int) -> dict[str, Any]:
    """Parameters of blocks as a scan has them, which repeats ``period`` blocks.

    Block ``k * period + j`` is item ``k`` of ``blocks/block_j``.
    """
    result: dict[str, Any] = {}
    groups: dict[str, list[np.ndarray]] = {}
    for path, array in published.items():
        found = re.fullmatch(r"block_(\d+)/(.*)", path)
        if found:
            name = f"blocks/block_{int(found[1]) % period}/{found[2]}"
            # In order, as blocks are.
            groups.setdefault(name, []).append(array)
        else:
            result[path] = array
    return result | {name: np.stack(arrays) for name, arrays in groups.items()}


def _flat(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")
