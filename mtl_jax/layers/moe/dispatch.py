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
    """Where assignments go, and the inverse.

    Indices run over all the groups that were assigned together, so they mean
    something only to ``dispatch`` and ``combine`` of the same groups.

    Attributes:
      slot: Row of the flattened buffers ``[experts groups capacity]`` for each
        assignment, -1 where it was dropped.
      assignment: Flattened ``[groups tokens selected]`` assignment in each slot, -1
        where the slot is empty.
    """

    slot: Int[Array, "groups tokens selected"]
    assignment: Int[Array, "groups experts capacity"]


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
    by_choice = expert_index.swapaxes(1, 2).reshape(num_groups, -1)
    chosen = jax.nn.one_hot(by_choice, num_experts, dtype=jnp.int32)
    earlier = jnp.cumsum(chosen, axis=1) - chosen
    position = jnp.sum(earlier * chosen, axis=-1)
    position = position.reshape(num_groups, num_selected, num_tokens).swapaxes(1, 2)

    group = jax.lax.broadcasted_iota(jnp.int32, expert_index.shape, 0)
    slot = (expert_index * num_groups + group) * capacity + position
    slot = jnp.where(position < capacity, slot, -1)

    shape = (num_experts, num_groups, capacity)
    assignment = jnp.full(math.prod(shape), -1, slot.dtype)
    assignment = assignment.at[slot.reshape(-1)].set(
        jnp.arange(slot.size, dtype=slot.dtype),
        mode="drop",
        wrap_negative_indices=False,
    )
    return Slots(slot, assignment.reshape(shape).swapaxes(0, 1))


def _gather(rows: Array, index: Array) -> Array:
    return rows.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.custom_vjp
def take_rows(
    rows: Float[Array, "rows width"],
    index: Int[Array, " taken"],
    inverse: Int[Array, "rows uses"],
) -> Float[Array, "taken width"]:
    """Rows by index, zero where the index is -1.

    The gradient with respect to ``rows`` is a gather too, by ``inverse``, where
    automatic differentiation would scatter.

    Args:
      rows: Rows to take from.
      index: Row to take for each row of the output.
      inverse: The rows of the output that each row was taken for, -1 where there are
        fewer of them.
    """
    del inverse
    return _gather(rows, index)


def _take_rows_forward(rows: Array, index: Array, inverse: Array):
    return take_rows(rows, index, inverse), inverse


def _take_rows_backward(inverse: Array, cotangent: Array):
    return jnp.sum(_gather(cotangent, inverse), axis=1), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def dispatch(
    tokens: Float[Array, "groups tokens width"], slots: Slots
) -> Float[Array, "experts groups capacity width"]:
    """Copies tokens into the buffers of their experts; empty slots are zero."""
    width, num_selected = tokens.shape[-1], slots.slot.shape[-1]
    assignment = slots.assignment.swapaxes(0, 1)
    buffers = take_rows(
        tokens.reshape(-1, width),
        assignment.reshape(-1) // num_selected,
        slots.slot.reshape(-1, num_selected),
    )
    return buffers.reshape(*assignment.shape, width)


def combine(
    buffers: Float[Array, "experts groups capacity width"],
    weight: Float[Array, "groups tokens selected"],
    slots: Slots,
) -> Float[Array, "groups tokens width"]:
    """Adds up the outputs of each token's experts by weight; dropped ones add zero."""
    width = buffers.shape[-1]
    outputs = take_rows(
        buffers.reshape(-1, width),
        slots.slot.reshape(-1),
        slots.assignment.swapaxes(0, 1).reshape(-1, 1),
    )
    outputs = outputs.reshape(*weight.shape, width)
    return jnp.sum(outputs * weight[..., None].astype(outputs.dtype), axis=2)
