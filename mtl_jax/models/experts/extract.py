"""The part of a model that one task uses."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from mtl_jax.models.experts.blocks import by_block
from mtl_jax.models.experts.layers import ExpertLayer, expert_layers
from mtl_jax.models.experts.usage import Usage
from mtl_jax.models.multitask import MultitaskModel
from mtl_jax.models.vit import VisionTransformer, layers_of_blocks

Kept = Mapping[str, np.ndarray]
"""Layer name -> indices of the experts that are kept, ascending."""


class Extracted(NamedTuple):
    """A model of one task.

    Attributes:
      model: Trunk and one head.
      params: Their parameters.
      collections: What the trunk keeps besides its parameters.
    """

    model: MultitaskModel
    params: Mapping[str, Any]
    collections: Mapping[str, Any]


def kept_experts(
    trunk: VisionTransformer, usage: Usage, threshold: float = 0.03
) -> dict[str, np.ndarray]:
    """The experts of each layer that a task needs (Mod-Squad; Chen et al., 2023).

    Args:
      trunk: The trunk.
      usage: Of the task, from `expert_usage`.
      threshold: An expert is kept where more than this fraction of the task's tokens go
        to it; so are, however little they are used, as many as a token goes to. The
        released code has 0.03.

    Raises:
      ValueError: If the threshold is not in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}; it must be at least 0 and below 1")
    kept = {}
    for layer in expert_layers(trunk):
        used = usage[layer.name]
        order = np.argsort(-used, kind="stable")
        count = max(layer.num_selected, int(np.sum(used > threshold)))
        kept[layer.name] = np.sort(order[:count])
    return kept


def visible_kept(
    trunk: VisionTransformer, kept: Kept, index: int
) -> dict[str, tuple[int, ...]]:
    """How many of the kept experts a task sees, for a gate that shows it some alone.

    Args:
      trunk: The trunk.
      kept: From `kept_experts`.
      index: Index of the task.

    Returns:
      ``visible_experts`` of the gate for one task, by name of the layer; layers whose
      gate shows all experts to all tasks are left out.
    """
    return {
        layer.name: (int(np.sum(kept[layer.name] < layer.visible_experts[index])),)
        for layer in expert_layers(trunk)
        if layer.visible_experts is not None
    }


def extracted_trunk(
    trunk: VisionTransformer, kept: Kept, index: int
) -> VisionTransformer:
    """The trunk with the kept experts alone, and routers for the task of that index."""
    layers = {(layer.kind, layer.block): layer for layer in expert_layers(trunk)}
    visible = visible_kept(trunk, kept, index)

    def fewer(kind: str, block: int, make: Any) -> Any:
        if (kind, block) not in layers:
            return make
        layer = layers[kind, block]
        if layer.name in visible:
            made = make() if kind == "moe" else make(trunk.num_heads)
            router = _showing(made.router, layer, visible[layer.name])
            make = functools.partial(make, router=router)
        return functools.partial(make, num_experts=len(kept[layer.name]))

    blocks = layers_of_blocks(trunk.moe, trunk.attention, trunk.depth)
    return _unscanned(trunk).clone(
        moe=tuple(fewer("moe", i, moe) for i, (moe, _) in enumerate(blocks)),
        attention=tuple(
            fewer("attention", i, attention) for i, (_, attention) in enumerate(blocks)
        ),
        num_tasks=None if trunk.num_tasks is None else 1,
    )


def extract(
    model: MultitaskModel,
    params: Mapping[str, Any],
    task: str,
    kept: Kept,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    collections: Mapping[str, Any] | None = None,
) -> Extracted:
    """A model of one task alone: its experts, its router, its head.

    Every parameter is cut along its logical axes: ``expert`` and ``expert_logits`` to
    the experts that are kept, ``task`` to the task. Where every expert is kept that the
    task's tokens go to, the model chooses as before; only weights that were not
    renormalised grow, as the softmax is over fewer experts. Experts with a capacity
    have more slots the fewer they are (`mtl_jax.layers.moe.dispatch.slots_per_expert`),
    so that tokens which found none may find one, and predictions differ by them.

    Collections are cut as parameters are, so that the biases of
    `mtl_jax.layers.moe.routers.LossFree` stay with their experts.

    Blocks that were scanned over are so no longer, as each may have another number of
    experts.

    Args:
      model: The model of all tasks, whose trunk is a `VisionTransformer`.
      params: Its parameters, unboxed.
      task: Name of the task.
      kept: From `kept_experts`.
      inputs: As for `MultitaskModel.init`.
      collections: What the trunk keeps besides its parameters, if anything: of routers,
        arrays ``[experts]`` or ``[tasks, experts]``.

    Returns:
      The model of the task, with arrays of the host.

    Raises:
      ValueError: If there is no such task, or a router has parameters that do not say
        by logical axes what belongs to which expert and task.
    """
    index = model.task_index(task)
    trunk: Any = model.trunk
    boxes = _flat(_abstract_params(_unscanned(trunk), inputs[task]))
    layers = expert_layers(trunk)

    def cut(path: tuple[str, ...], leaf: Any, axes: tuple) -> np.ndarray:
        leaf = np.asarray(leaf)
        for axis, name in enumerate(axes):
            if name == "task":
                leaf = np.take(leaf, [index], axis=axis)
            if name in ("expert", "expert_logits"):
                leaf = np.take(leaf, kept[_layer_of(path, layers).name], axis=axis)
        return leaf

    cuts = {
        path: cut(path, leaf, getattr(boxes[path], "names", ()))
        for path, leaf in _flat(by_block(params["trunk"])).items()
    }
    balance = ("task", "expert_logits")
    kept_besides = {
        name: _nested(
            {
                path: cut(path, leaf, balance[-leaf.ndim :])
                for path, leaf in _flat(by_block(collection)).items()
            }
        )
        for name, collection in (collections or {}).items()
    }
    smaller = MultitaskModel(
        extracted_trunk(trunk, kept, index), {task: model.heads[task]}
    )
    made = {"trunk": _nested(cuts), "heads": {task: params["heads"][task]}}
    _check(made["trunk"], _abstract_params(smaller.trunk, inputs[task]))
    return Extracted(smaller, made, kept_besides)


def _showing(make_router: Any, layer: ExpertLayer, visible: tuple[int, ...]) -> Any:
    """Makes the layer's router with a gate that shows so many experts to each task."""
    router = make_router(num_experts=layer.num_experts, num_selected=layer.num_selected)
    gate = functools.partial(router.gate, visible_experts=visible)
    return functools.partial(make_router, gate=gate)


def _unscanned(trunk: VisionTransformer) -> VisionTransformer:
    return trunk.clone(scan=False)


def _flat(tree: Mapping[str, Any]) -> Mapping[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(
        dict(tree), is_leaf=lambda _, leaf: not isinstance(leaf, Mapping)
    )


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(dict(flat))


def _layer_of(path: tuple[str, ...], layers: list[ExpertLayer]) -> ExpertLayer:
    """The layer of experts that a parameter belongs to."""
    return next(
        layer for layer in layers if path[:2] == (f"block_{layer.block}", layer.kind)
    )


def _abstract_params(trunk: Any, inputs: jax.ShapeDtypeStruct) -> Mapping[str, Any]:
    """Shapes and logical axes of a trunk's parameters, boxed."""
    task = None if trunk.num_tasks is None else 0

    def init(images: jax.Array) -> Any:
        return trunk.init(jax.random.key(0), images, task, train=False)["params"]

    return jax.eval_shape(init, inputs)


def _check(made: Mapping[str, Any], boxed: Mapping[str, Any]) -> None:
    wanted, shapes = _flat(nn.unbox(boxed)), _flat(made)
    for path, leaf in wanted.items():
        if shapes[path].shape != leaf.shape:
            raise ValueError(
                f"{'/'.join(path)} cannot be extracted: it is {shapes[path].shape} and "
                f"should be {leaf.shape}; name the axes of the router's parameters "
                "'task' and 'expert_logits'"
            )
