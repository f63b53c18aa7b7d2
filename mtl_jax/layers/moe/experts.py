"""Experts: any Flax module, lifted to one set of parameters an expert."""

from flax import linen as nn
from jaxtyping import Array, Float


def apply_experts(
    expert: nn.Module, buffers: Float[Array, "experts groups capacity width"]
) -> Float[Array, "experts groups capacity width"]:
    """Applies each expert to its own buffers.

    Args:
      expert: A module made within the caller's ``nn.compact`` method. Its parameters
        become ``[expert, ...]`` with the logical axis ``expert`` in front, each
        expert's initialised with its own key.
      buffers: Inputs of each expert.
    """
    lifted = nn.vmap(
        lambda module, rows: module(rows),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        metadata_params={nn.PARTITION_NAME: "expert"},
    )
    return lifted(expert, buffers)
