"""Parameters of a trunk whose blocks are scanned over, and block by block."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def by_block(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of blocks that are scanned over, as those of blocks one by one.

    The ``i``-th of what is stacked in ``blocks/block_j`` is ``block_{i · period + j}``.
    """
    tree = dict(tree)
    stacked = tree.pop("blocks", {})
    for name, block in stacked.items():
        number = jax.tree.leaves(block)[0].shape[0]
        place = int(name.removeprefix("block_"))
        for i in range(number):
            tree[f"block_{i * len(stacked) + place}"] = jax.tree.map(
                lambda leaf, i=i: leaf[i], block
            )
    return tree


def stacked(tree: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The inverse of `by_block`, for a scan that repeats ``period`` blocks."""
    tree = dict(tree)
    depth = sum(name.startswith("block_") for name in tree)
    blocks = [tree.pop(f"block_{i}") for i in range(depth)]
    tree["blocks"] = {
        f"block_{j}": jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *blocks[j::period]
        )
        for j in range(period)
    }
    return tree
