"""Experts: any Flax module, with one set of parameters an expert."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from mtl_jax.layers.moe.grouped import Linear, Stage, linear


def expert_stages(
    expert: nn.Module, num_experts: int, width: int, dtype: DTypeLike
) -> tuple[Sequence[Stage], PyTree]:
    """What an expert does, and the parameters of many of them.

    An expert is any Flax module from rows to rows. It may have a method ``stages()``
    that gives the same computation as pure functions of its parameters (see
    `mtl_jax.layers.moe.grouped`), which saves memory traffic on sorted rows and lets
    it use grouped matrix products.

    Args:
      expert: A module made within the caller's ``nn.compact`` method. Its parameters
        become ``[expert, ...]`` with the logical axis ``expert`` in front, each
        expert's initialised with its own key.
      num_experts: Number of experts.
      width: Width of a row.
      dtype: Dtype of the computation, to which the parameters returned are cast.

    Returns:
      The stages, and the parameters with a leading axis over experts.
    """
    lifted = nn.vmap(
        lambda module, rows: module(rows),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "expert"},
    )
    if expert.is_initializing():
        lifted(expert, jnp.zeros((num_experts, 1, width), dtype))
    parameters = nn.unbox(expert.variables["params"])
    parameters = jax.tree.map(lambda p: p.astype(dtype), parameters)
    return _stages(expert), parameters


def _stages(expert: nn.Module) -> Sequence[Stage]:
    """What an expert does, as pure functions; see `expert_stages`."""
    if hasattr(expert, "stages"):
        return expert.stages()
    free = expert.clone(parent=None, name=None)

    def whole(parameters: PyTree, rows: Array, linear: Linear) -> Array:
        del linear
        return free.apply({"params": parameters}, rows)  # type: ignore[return-value]

    return (whole,)


def apply_buffers(
    stages: Sequence[Stage],
    parameters: PyTree,
    buffers: Float[Array, "experts groups capacity width"],
) -> Float[Array, "experts groups capacity features"]:
    """Applies each expert to its own buffers."""

    def one(parameters: PyTree, rows: Array) -> Array:
        value: PyTree = rows
        for stage in stages:
            value = stage(parameters, value, linear)
        return value

    # With one axis of rows the products are plain ones, which compile to better code.
    rows = buffers.reshape(buffers.shape[0], -1, buffers.shape[-1])
    outputs = jax.vmap(one)(parameters, rows)
    return outputs.reshape(*buffers.shape[:-1], -1)
