"""Parameters that a run starts from other than fresh ones, such as pretrained ones."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from mtl_jax.sharding.rules import path_name


def check_initialize(initialize: Callable[[PyTree], PyTree], params: PyTree) -> None:
    """Checks what an experiment's ``initialize`` makes by its shapes alone.

    Args:
      initialize: From fresh parameters to those that a run starts from.
      params: Shapes and types of the model's parameters, unboxed.

    Raises:
      ValueError: If it makes other shapes or types than those of ``params``, or fails
        by itself.
    """
    try:
        made = jax.eval_shape(initialize, params)
    except Exception as error:  # it may be anybody's function
        known = isinstance(error, OSError | ValueError)
        kind = "" if known else f"{type(error).__name__}: "
        raise ValueError(f"initialize: {kind}{error}") from error
    _check_fits(made, params)


def initialized(
    initialize: Callable[[PyTree], PyTree], params: PyTree, shardings: PyTree
) -> PyTree:
    """What ``initialize`` makes of fresh parameters, placed where they belong.

    Args:
      initialize: From fresh parameters to those that a run starts from. Leaves that it
        passes on stay where they are; of an array of the host, every device gets its
        part only.
      params: Fresh parameters, unboxed.
      shardings: Where each of them belongs.

    Returns:
      The parameters.

    Raises:
      ValueError: If its shapes or types are not those of ``params``.
    """
    made = initialize(params)
    _check_fits(made, params)

    def place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, made, shardings)


def _check_fits(made: PyTree, params: PyTree) -> None:
    there, here = (
        {
            path_name(path): f"{np.dtype(leaf.dtype)} {tuple(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (made, params)
    )
    different = [
        path for path in {**here, **there} if here.get(path) != there.get(path)
    ]
    if different:
        path = different[0]
        raise ValueError(
            f"initialize makes {path} {there.get(path, 'absent')}, which is "
            f"{here.get(path, 'absent')} in the model, and {len(different) - 1} more "
            "differ; change the trunk to fit what it is initialized with, or make it "
            "return parameters of the model's shapes and types"
        )
