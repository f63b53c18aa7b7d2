"""Models that grow by tasks and experts, with what was there left as it is."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_leaves_with_path as leaves_with_path
from jaxtyping import Array, Bool, PyTree

from mtl_jax.sharding.rules import path_name

Shapes = Mapping[str, tuple[int, ...]]
"""Path such as ``trunk/block_1/moe/router/gate/kernel`` -> shape."""


def extend(params: Mapping[str, Any], smaller: Mapping[str, Any]) -> Any:
    """Parameters of a larger model with those of a smaller one inside.

    The larger model may have more tasks, at the end, and so more heads and rows of
    gates; and more experts, behind the others, and so more columns of gates. What the
    smaller one has fills the front of each array, and the rest stays fresh.

    More tasks leave the others' outputs as they are. More experts do so where the gates
    hide them from the others (``visible_experts`` of `mtl_jax.layers.moe.gates.Gate`)
    and experts take every token (``capacity_factor=None``, and a router by which tokens
    choose): with a capacity, each expert takes fewer tokens the more experts there are.
    Validation of an experiment that starts from a run by this function refuses it.

    Outputs are then the same to the last bit on a CPU, as XLA compiles by default,
    where experts are not split over devices: tasks are routed as if there were only the
    experts that they see, and these compute blocks of the rows that suit the fewest
    that some task sees. Split over devices, outputs are added up in another order.
    Grouped matrix products, which layers choose on accelerators, may round otherwise
    for another number of experts: by ``jax.lax.ragged_dot`` on a CPU, outputs of a
    layer in float32 differed by up to 4e-7 of the largest.

    Args:
      params: Fresh parameters of the larger model.
      smaller: Parameters of the smaller one, whose trunk must keep nothing besides
        them: biases of `mtl_jax.layers.moe.routers.LossFree` have no place here, and
        `mtl_jax.train.start_from.start_from` refuses runs that have some.

    Returns:
      Parameters of the shapes and types of ``params``.

    Raises:
      ValueError: If the smaller model has a parameter that the larger one lacks, or a
        larger one.
    """
    there = {path_name(path): leaf for path, leaf in leaves_with_path(smaller)}
    here = {path_name(path): leaf.shape for path, leaf in leaves_with_path(params)}
    for name, leaf in there.items():
        shape = here.get(name)
        if shape is None or not _grows(name, leaf.shape, shape):
            raise ValueError(
                f"{name} is {leaf.shape} in the model to extend, and "
                f"{shape or 'absent'} in this one; a larger model has all its tasks "
                "and experts first, and everything else the same"
            )

    def filled(path: tuple, leaf: Array) -> Array:
        old = there.get(path_name(path))
        if old is None:
            return leaf
        front = tuple(slice(size) for size in old.shape)
        return jnp.asarray(leaf).at[front].set(jnp.asarray(old, leaf.dtype))

    return jax.tree_util.tree_map_with_path(filled, params)


def _grows(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether a parameter differs by more tasks and experts alone."""
    parts = name.split("/")
    # Blocks that are scanned over have an axis in front.
    first, last = int("blocks" in parts), len(new) - 1
    free = set()
    if "experts" in parts:
        free = {first}
    elif "router" in parts:
        free = {first, last}
    elif parts[-1] == "task_embedding":
        free = {0}
    return len(old) == len(new) and all(
        here == there or (axis in free and here < there)
        for axis, (here, there) in enumerate(zip(old, new, strict=True))
    )


def only_new(
    optimizer: optax.GradientTransformation, shapes: Shapes
) -> optax.GradientTransformation:
    """An optimizer that moves only what a smaller model does not have.

    What `extend` filled in gets no update to the last bit, and its gradient does not
    count in the norm that gradients are clipped to.

    Args:
      optimizer: What moves the rest.
      shapes: Shapes of the smaller model's parameters.
    """
    new = _only_new(shapes)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(new(updates), state, params)
        return new(updates), state

    return optax.GradientTransformation(optimizer.init, update)


def _only_new(shapes: Shapes) -> Callable[[PyTree], PyTree]:
    def keep(path: tuple, leaf: Array) -> Array:
        old = shapes.get(path_name(path))
        if old is None:
            return leaf
        return jnp.where(_outside(leaf.shape, old), leaf, jnp.zeros_like(leaf))

    return lambda tree: jax.tree_util.tree_map_with_path(keep, tree)


def _outside(shape: tuple[int, ...], old: tuple[int, ...]) -> Bool[Array, "..."]:
    """Which entries of an array are behind those of a smaller one."""
    outside = jnp.zeros(shape, bool)
    for axis, size in enumerate(old):
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        outside |= place >= size
    return outside
