"""A trained model for some of its tasks, with only their experts on the device.

Which experts a task uses is measured on data (`mtl_jax.models.experts.expert_usage`)
and turned into sets (`used_experts`); `place_params` puts those on the device and
leaves the others in the host's memory; `Predictor` runs the model from there. With no
expert at all on the device, they come one after another
(`mtl_jax.layers.moe.streaming`).
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from mtl_jax.layers.moe.routing import Routing
from mtl_jax.layers.moe.streaming import (
    MISSING,
    PlacedExperts,
    place_experts,
    streaming,
)
from mtl_jax.models.experts import Usage
from mtl_jax.models.multitask import MultitaskModel, Params, layer_statistics

FIRST_CHOICE = "first_choice"
"""Statistic of a router: the expert that each token goes to first."""


ATTENTION = "_attention"
"""How the names of layers end whose experts are heads of attention."""


class MissingExpertError(LookupError):
    """A token was sent to an expert that is neither on the device nor on the host."""


def single_examples(model: MultitaskModel) -> MultitaskModel:
    """The same model with every example a routing group, so that any batch will do.

    Predictions stay the same where experts take all that is sent to them. Where they
    have a capacity, groups share it, and such a layer stays as it is.
    """
    moe = getattr(model.trunk, "moe", None)
    if moe is None:
        return model

    def single(make: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if make is None:
            return None
        layer = make()
        router = layer.router(
            num_experts=layer.num_experts, num_selected=layer.num_selected
        )
        # A router with a capacity of its own fills buffers from a whole group.
        limits = (layer.limit(train=False), getattr(router, "capacity_factor", None))
        if limits != (None, None):
            return make
        return functools.partial(make, group_size=1)

    trunk: Any = model.trunk
    made = tuple(map(single, moe)) if isinstance(moe, tuple) else single(moe)
    return MultitaskModel(trunk.clone(moe=made), model.heads)


def group_size(model: MultitaskModel) -> int:
    """What the number of images must be a multiple of: the model's routing group."""
    moe = getattr(model.trunk, "moe", None)
    makers = moe if isinstance(moe, tuple) else (moe,)
    return math.lcm(*(make().group_size for make in makers if make is not None))


def as_placed_experts(trunk_params: Mapping) -> dict:
    """Parameters with all experts `PlacedExperts` where they are; a pure function.

    The layers then compute in a way that does not depend on the platform, for any
    number of images. Blocks that a scan repeats stay as they are.
    """

    def placed(experts: PyTree) -> PlacedExperts:
        number = jax.tree.leaves(experts)[0].shape[0]
        none = jax.tree.map(lambda leaf: leaf[:0], experts)
        return PlacedExperts(experts, none, jnp.arange(number, dtype=jnp.int32))

    return {
        name: {
            **block,
            "moe": {**block["moe"], "experts": placed(block["moe"]["experts"])},
        }
        if isinstance(block, Mapping) and "moe" in block
        else block
        for name, block in trunk_params.items()
    }


def task_features(
    model: MultitaskModel,
    trunk_params: Mapping,
    images: Array,
    index: Int[Array, ""] | int,
    collections: Mapping[str, Any] | None = None,
) -> tuple[Float[Array, "batch rows columns width"], dict[str, Any]]:
    """What the trunk gives for one task. A pure function.

    Args:
      model: The model.
      trunk_params: Parameters of its trunk; experts may be `PlacedExperts`.
      images: ``[batch, height, width, channels]``.
      index: Index of the task, possibly traced.
      collections: What the trunk keeps besides its parameters.

    Returns:
      The features, and the statistics of each block with experts by the block's name.
    """
    with streaming():
        return _apply(model, trunk_params, images, index, collections)


def _apply(
    model: MultitaskModel,
    trunk_params: Mapping,
    images: Array,
    index: Int[Array, ""] | int,
    collections: Mapping[str, Any] | None,
) -> tuple[Array, dict[str, Any]]:
    features, sown = model.trunk.apply(
        {"params": trunk_params, **(collections or {})},
        images,
        jnp.asarray(index, jnp.int32) if model.task_conditioned else None,
        train=False,
        mutable=["statistics"],
    )
    period = getattr(model.trunk, "period", 1)
    return features, layer_statistics(sown.get("statistics") or {}, period)


def predict(
    model: MultitaskModel,
    params: Params,
    images: Array,
    task: str,
    collections: Mapping[str, Any] | None = None,
) -> Array:
    """The prediction of one task. A pure function.

    It does not tell of experts that were left out; `Predictor` does.

    Args:
      model: The model.
      params: Its parameters, those of other tasks' heads may be absent.
      images: ``[batch, height, width, channels]``.
      task: Name of the task.
      collections: What the trunk keeps besides its parameters.

    Raises:
      ValueError: If the model has no such task.
    """
    index = model.task_index(task)
    features, _ = task_features(model, params["trunk"], images, index, collections)
    return model.apply_head(params["heads"][task], features, task)


def first_choices(
    model: MultitaskModel,
    trunk_params: Mapping,
    images: Array,
    index: Int[Array, ""] | int,
    collections: Mapping[str, Any] | None = None,
) -> dict[str, Int[Array, "batch rows columns"]]:
    """The expert that each patch goes to first, in every layer. A pure function.

    Args:
      model: The model.
      trunk_params: Parameters of its trunk.
      images: ``[batch, height, width, channels]``.
      index: Index of the task, possibly traced.
      collections: What the trunk keeps besides its parameters.

    Returns:
      Layer -> experts, those of attention included; nothing of layers whose router
      leaves no choice to tokens.
    """

    def intercept(
        call: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        decision = call(*arguments, **keywords)
        if isinstance(decision, Routing):
            context.module.sow(
                "statistics",
                FIRST_CHOICE,
                decision.expert_index[..., 0].reshape(len(images), -1),
                reduce_fn=lambda _, new: new,
                init_fn=lambda: jnp.zeros((), jnp.int32),
            )
        return decision

    with nn.intercept_methods(intercept):
        features, sown = _apply(model, trunk_params, images, index, collections)
    _, rows, columns, _ = features.shape
    # Tokens of no patch, such as that of the class, come first.
    by_layer = {layer: values.get("router", {}) for layer, values in sown.items()}
    return {
        layer: written[FIRST_CHOICE][:, -rows * columns :].reshape(-1, rows, columns)
        for layer, written in by_layer.items()
        if FIRST_CHOICE in written
    }


def used_experts(
    usages: Iterable[Usage], coverage: float = 1.0
) -> dict[str, tuple[int, ...]]:
    """The experts that tasks need, for `place_params`.

    Args:
      usages: Of each task that is to run, from `mtl_jax.models.experts.expert_usage`.
      coverage: Share of each task's assignments in each layer that the experts must
        serve, in (0, 1]; the fewest that do are taken. 1 takes all that were used.

    Returns:
      Layer -> experts, ascending; the union over tasks. Layers of attention are not
      among them, as `place_params` puts all their experts on the device.

    Raises:
      ValueError: If the coverage is out of range.
    """
    if not 0 < coverage <= 1:
        raise ValueError(
            f"coverage is {coverage}; it must be greater than 0 and at most 1"
        )
    chosen: dict[str, set[int]] = {}
    for usage in usages:
        for layer, used in usage.items():
            if layer.endswith(ATTENTION):
                continue
            share = used / used.sum()
            order = np.argsort(-share, kind="stable")
            before = np.cumsum(share[order]) - share[order]
            # The last digits of a sum of shares are not to bring in another expert.
            needed = (share[order] > 0) & (before < coverage - 1e-9)
            chosen.setdefault(layer, set()).update(order[needed].tolist())
    return {layer: tuple(sorted(experts)) for layer, experts in chosen.items()}


def place_params(
    params: Params,
    tasks: Collection[str],
    resident: Mapping[str, Sequence[int]],
    *,
    others: Literal["host", "nowhere"] = "host",
    device: Any = None,
) -> Params:
    """Puts what some tasks need on the device.

    Args:
      params: Parameters of the whole model, of NumPy or on any device.
      tasks: The tasks that are to run; the heads of others are left out.
      resident: Block -> experts that the device holds, as `used_experts` gives them;
        none of a block that is not named. An empty mapping streams all of them. Those
        of attention (`mtl_jax.layers.moe.MoeAttention`) are all on the device, and not
        to be named.
      others: Whether other experts wait in the host's memory, from which they come
        when a token wants them; or are nowhere, and a token that wants one is an error
        of `Predictor`.
      device: The device; JAX's first by default.

    Raises:
      ValueError: If there is no such task, block or expert, if an attention's experts
        are named, or if blocks are repeated by a scan, which has the experts of all of
        them in one array.
    """
    if "blocks" in params["trunk"]:
        raise ValueError(
            "the trunk repeats its blocks by a scan, so that their experts lie in one "
            "array; use the parameters of a trunk with scan=False"
        )
    unknown = sorted(set(tasks) - set(params["heads"]))
    if unknown:
        raise ValueError(
            f"tasks names {unknown[0]!r}, but the parameters have heads for "
            f"{sorted(params['heads'])}"
        )
    device = device or jax.local_devices()[0]
    found: set[str] = set()

    def place(tree: Mapping, path: tuple[str, ...] = ()) -> dict:
        placed = {}
        for name, value in tree.items():
            if name == "experts" and path[-1:] == ("moe",):
                block = path[-2]
                found.add(block)
                placed[name] = place_experts(
                    value, resident.get(block, ()), others=others, device=device
                )
            elif isinstance(value, Mapping):
                placed[name] = place(value, (*path, name))
            else:
                placed[name] = jax.device_put(value, device)
        return placed

    trunk = place(params["trunk"])
    attention = sorted(layer for layer in resident if layer.endswith(ATTENTION))
    if attention:
        raise ValueError(
            f"resident names {attention[0]!r}, but experts of attention cannot be left "
            "out: all of them are placed on the device; leave the layer out of "
            "resident, or extract the model of one task"
        )
    if set(resident) - found:
        raise ValueError(
            f"resident names block {min(set(resident) - found)!r}, but blocks with "
            f"experts are {sorted(found)}"
        )
    return {
        "trunk": trunk,
        "heads": {task: place(params["heads"][task]) for task in tasks},
    }


class Predictor:
    """Runs a model task by task from parameters that `place_params` placed.

    The trunk is one compiled program for all tasks: to switch moves the index of a task
    and nothing else.

    Args:
      model: The model.
      params: Its placed parameters.
      collections: What the trunk keeps besides its parameters.
    """

    def __init__(
        self,
        model: MultitaskModel,
        params: Params,
        collections: Mapping[str, Any] | None = None,
    ):
        self.model, self.params = model, params
        self.trunk = jax.jit(
            functools.partial(task_features, model, collections=collections)
        )
        self._head = jax.jit(model.apply_head, static_argnums=2)
        layers = jax.tree.leaves(
            params["trunk"], is_leaf=lambda node: isinstance(node, PlacedExperts)
        )
        self._complete = all(
            np.all(np.asarray(layer.place) >= 0)
            for layer in layers
            if isinstance(layer, PlacedExperts)
        )

    def __call__(self, images: Array, task: str) -> Array:
        """The prediction of a task.

        Args:
          images: ``[batch, height, width, channels]``.
          task: One of the tasks that the parameters were placed for.

        Raises:
          ValueError: If the model has no such task, or it has no head here.
          MissingExpertError: If a patch was routed to an expert that was left out; says
            to which, and how many.
        """
        index = np.int32(self.model.task_index(task))
        if task not in self.params["heads"]:
            raise ValueError(
                f"task is {task!r}, but the parameters were placed for "
                f"{sorted(self.params['heads'])}"
            )
        features, statistics = self.trunk(self.params["trunk"], images, index)
        prediction = self._head(self.params["heads"][task], features, task)
        if self._complete:
            return prediction
        for block, values in statistics.items():
            # Only layers that can lack an expert count what they miss.
            counts = np.asarray(values.get(MISSING, 0))
            if counts.any():
                expert = int(np.argmax(counts))
                raise MissingExpertError(
                    f"task {task!r} sent {counts.sum()} patches in {block} to experts "
                    f"that were left out, {counts[expert]} of them to expert {expert}; "
                    "place more experts, or let the others wait on the host"
                )
        return prediction
