"""Moving tokens into experts' buffers of fixed capacity, and back.

A *group* of tokens is routed by itself. Within a group every expert has ``capacity``
slots; an assignment is one (token, choice) pair, and takes one slot or is dropped.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Slots(NamedTuple):
    """Where a group's assignments go, and the inverse.

    Attributes:
      slot: The slot of each assignment, ``expert · capacity + position``;
        ``experts · capacity`` where it was dropped.
      assignment: The assignment in each slot, ``token · selected + choice``;
        ``tokens · selected`` where the slot is empty.
    """

    slot: Int[Array, "groups tokens selected"]
    assignment: Int[Array, "groups slots"]


def slots_per_expert(
    num_tokens: int, num_experts: int, num_selected: int, capacity_factor: float
) -> int:
    """Slots of each expert for the tokens of one group.

    ``ceil(capacity_factor · num_selected · num_tokens / num_experts)``, and at most
    ``num_tokens``, as no token goes to an expert twice.

    Args:
      num_tokens: Tokens of a group.
      num_experts: Number of experts.
      num_selected: Experts a token goes to.
      capacity_factor: Slots over what a perfectly balanced router needs.

    Raises:
      ValueError: If the capacity would be less than one slot.
    """
    capacity = math.ceil(capacity_factor * num_selected * num_tokens / num_experts)
    if capacity < 1:
        raise ValueError(
            f"capacity_factor={capacity_factor} gives {num_experts} experts no slot "
            f"for {num_tokens} tokens; make it positive."
        )
    return min(capacity, num_tokens)


def assign_slots(
    expert_index: Int[Array, "groups tokens selected"], num_experts: int, capacity: int
) -> Slots:
    """Gives assignments their slots, in order, until an expert's slots are taken.

    All first choices of a group come before any second choice, and so on; among equal
    choices the earlier token comes first.

    Args:
      expert_index: Experts of each token, the best first.
      num_experts: Number of experts.
      capacity: Slots of each expert in each group.

    Returns:
      The slots; assignments that find none are dropped.
    """
    num_groups, num_tokens, num_selected = expert_index.shape
    num_slots, num_assignments = num_experts * capacity, num_tokens * num_selected
    by_choice = expert_index.swapaxes(1, 2).reshape(num_groups, num_assignments)
    chosen = jax.nn.one_hot(by_choice, num_experts, dtype=jnp.int32)
    earlier = jnp.cumsum(chosen, axis=1) - chosen
    position = jnp.sum(earlier * chosen, axis=-1)
    position = position.reshape(num_groups, num_selected, num_tokens).swapaxes(1, 2)
    slot = jnp.where(position < capacity, expert_index * capacity + position, num_slots)

    def invert(slot: Int[Array, " assignments"]) -> Int[Array, " slots"]:
        empty = jnp.full(num_slots, num_assignments, slot.dtype)
        everyone = jnp.arange(num_assignments, dtype=slot.dtype)
        return empty.at[slot].set(everyone, mode="drop")

    assignment = jax.vmap(invert)(slot.reshape(num_groups, num_assignments))
    return Slots(slot, assignment)


def _gather(rows: Array, index: Array) -> Array:
    return rows.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take_rows(
    rows: Float[Array, "rows width"],
    index: Int[Array, " taken"],
    inverse: Int[Array, "rows uses"],
) -> Float[Array, "taken width"]:
    """Rows by index, zero where the index is out of range.

    The gradient with respect to ``rows`` is a gather too, by ``inverse``, where
    automatic differentiation would scatter.

    Args:
      rows: Rows to take from.
      index: Row to take for each row of the output; too large an index gives zeros.
      inverse: The rows of the output that each row was taken for; too large an index
        where there are fewer of them.
    """
    del inverse
    return _gather(rows, index)


def _take_rows_forward(rows: Array, index: Array, inverse: Array):
    return take_rows(rows, index, inverse), inverse


def _take_rows_backward(inverse: Array, cotangent: Array):
    return jnp.sum(_gather(cotangent, inverse), axis=1), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def dispatch(
    tokens: Float[Array, "groups tokens width"], slots: Slots, num_experts: int
) -> Float[Array, "experts groups capacity width"]:
    """Copies tokens into the buffers of their experts; empty slots are zero."""
    num_groups, _, width = tokens.shape
    token = slots.assignment // slots.slot.shape[-1]
    buffers = jax.vmap(take_rows)(tokens, token, slots.slot)
    return buffers.reshape(num_groups, num_experts, -1, width).swapaxes(0, 1)


def combine(
    buffers: Float[Array, "experts groups capacity width"],
    weight: Float[Array, "groups tokens selected"],
    slots: Slots,
) -> Float[Array, "groups tokens width"]:
    """Adds up the outputs of each token's experts by weight; dropped ones add zero."""
    num_groups, num_tokens, num_selected = weight.shape
    width = buffers.shape[-1]
    taken = jax.vmap(take_rows)(
        buffers.swapaxes(0, 1).reshape(num_groups, -1, width),
        slots.slot.reshape(num_groups, -1),
        slots.assignment[..., None],
    )
    taken = taken.reshape(num_groups, num_tokens, num_selected, width)
    return jnp.sum(taken * weight[..., None].astype(taken.dtype), axis=2)
