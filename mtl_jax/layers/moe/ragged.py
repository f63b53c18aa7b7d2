"""Exchange of rows between devices that share experts, as many as there are.

No capacity is needed and no empty row travels. Every device sends each expert the
rows that its tokens have for it, straight to where they belong among its sorted rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtl_jax.layers.moe import dispatch
from mtl_jax.sharding.expert_parallel import EXPERT_AXIS


class Plan(NamedTuple):
    """Where every device's rows of every expert lie, and lie there.

    Attributes:
      sent: Rows of this device's tokens for each expert of all devices.
      here: Where they begin here, sorted by expert.
      there: Where they begin among the rows of their expert's device.
      received: Rows from each device for each expert of this one, as they are sorted.
      placed: Where those begin.
      origin: Where they began on their own device.
      total: Rows of each expert of this device.
    """

    sent: Int[Array, " experts"]
    here: Int[Array, " experts"]
    there: Int[Array, " experts"]
    received: Int[Array, " sources_experts"]
    placed: Int[Array, " sources_experts"]
    origin: Int[Array, " sources_experts"]
    total: Int[Array, " local_experts"]


def plan(count: Int[Array, " experts"], sizes: tuple[int, ...]) -> Plan:
    """Plans the exchange; inside `jax.shard_map` over mesh axis ``expert``.

    Args:
      count: Rows of this device's tokens for each expert of all devices.
      sizes: Sizes of blocks that each expert's rows are padded to, ascending.
    """
    counts = jax.lax.all_gather(count, EXPERT_AXIS)
    num_devices, num_experts = counts.shape
    part, num_local = jax.lax.axis_index(EXPERT_AXIS), num_experts // num_devices
    total = jnp.sum(counts, axis=0)
    padded = dispatch.padded_count(total, sizes).reshape(num_devices, num_local)
    start = (jnp.cumsum(padded, axis=1) - padded).reshape(1, num_experts)
    there = start + jnp.cumsum(counts, axis=0) - counts
    here = jnp.cumsum(counts, axis=1) - counts

    def of_mine(values: Int[Array, "devices experts"]) -> Int[Array, " mine"]:
        return jax.lax.dynamic_slice_in_dim(
            values, part * num_local, num_local, axis=1
        ).reshape(-1)

    return Plan(
        count,
        here[part],
        there[part],
        of_mine(counts),
        of_mine(there),
        of_mine(here),
        of_mine(total[None]),
    )


def to_experts(
    rows: Float[Array, "rows width"], planned: Plan, num_rows: int
) -> Float[Array, "received width"]:
    """Rows of this device's experts, sorted by expert and zero where padded.

    Args:
      rows: Rows of this device's tokens, sorted by expert without padding.
      planned: From `plan`.
      num_rows: Rows that a device may have to hold.
    """
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((num_rows, rows.shape[-1]), rows.dtype),
        planned.here,
        planned.sent,
        planned.there,
        planned.received,
        axis_name=EXPERT_AXIS,
    )


def to_tokens(
    rows: Float[Array, "received width"], planned: Plan, num_rows: int
) -> Float[Array, "rows width"]:
    """The reverse of `to_experts`, with ``num_rows`` rows of this device's tokens."""
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((num_rows, rows.shape[-1]), rows.dtype),
        planned.placed,
        planned.received,
        planned.origin,
        planned.sent,
        axis_name=EXPERT_AXIS,
    )
