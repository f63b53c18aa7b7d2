"""Mixtures of experts that begin as copies of a dense model's perceptrons."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp

from mtl_jax.models.experts.blocks import by_block, stacked


def upcycle(params: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Sparse upcycling (Komatsuzaki et al., ICLR 2023).

    Every expert starts as the perceptron that the dense model has in its place, without
    noise. Routers stay fresh; all else is the dense model's, its heads where it has
    those.

    At first the model computes what the dense one did times the sum of a token's
    weights. With routers that renormalise weights to sum 1
    (`mtl_jax.layers.moe.routers.LossFree`, for one) and experts that take every token
    it is the same, as the paper advises for vision.

    Args:
      params: Fresh parameters ``{"trunk": ..., "heads": ...}`` of the model with
        experts.
      dense: Parameters of a dense model that is the same but for ``moe``.

    Returns:
      Parameters of the shapes and types of ``params``.

    Raises:
      ValueError: If the models differ in more than that, or experts are of other sizes
        than the perceptrons; the message names a parameter.
    """
    source = _flat(by_block(dense["trunk"]))
    made, used = {}, set()
    for path, leaf in _flat(by_block(params["trunk"])).items():
        block, _, rest = path.partition("/moe/")
        kind, _, inside = rest.partition("/")
        if kind == "router":
            made[path] = leaf
            continue
        origin = f"{block}/mlp/{inside}" if kind == "experts" else path
        if origin not in source:
            raise ValueError(
                f"the trunk has {path}, and the dense one no {origin}; make them the "
                "same but for moe"
            )
        used.add(origin)
        copied = jnp.asarray(source[origin], leaf.dtype)
        if copied.shape != (leaf.shape[1:] if kind == "experts" else leaf.shape):
            raise ValueError(
                f"{path} is {leaf.shape}, and {origin} of the dense trunk "
                f"{source[origin].shape}; give experts and perceptrons the same sizes "
                "(expert_hidden = mlp_ratio · width)"
            )
        made[path] = jnp.broadcast_to(copied, leaf.shape)
    left = [path for path in source if path not in used]
    if left:
        raise ValueError(
            f"the dense trunk has {left[0]}, which has no place in this trunk; make "
            "them the same but for moe"
        )
    trunk = flax.traverse_util.unflatten_dict(made, sep="/")
    if "blocks" in params["trunk"]:
        trunk = stacked(trunk, len(params["trunk"]["blocks"]))
    heads = {
        task: _head_of(task, head, dense.get("heads", {}))
        for task, head in params["heads"].items()
    }
    return {"trunk": trunk, "heads": heads}


def _head_of(task: str, fresh: Mapping[str, Any], heads: Mapping[str, Any]) -> Any:
    if task not in heads:
        return fresh
    there, here = _flat(heads[task]), _flat(fresh)
    for path, leaf in here.items():
        if path not in there or there[path].shape != leaf.shape:
            raise ValueError(
                f"the head of task {task!r} differs from the dense model's in {path}; "
                "make them the same, or rename the task"
            )
    return heads[task]


def _flat(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")
