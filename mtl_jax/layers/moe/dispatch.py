"""Moving tokens to the rows that experts compute on, and back.

A *group* of tokens is routed by itself. An assignment is one (token, choice) pair; it
takes one row, or is dropped where its expert has no capacity left. Rows lie in one of
two layouts:

- *buffers*: ``capacity`` rows of every expert for every group, of which some stay
  empty. The layout can be split over devices, and sent between them.
- *sorted*: all rows of one expert after those of the one before, each expert's padded
  to the blocks that it is computed in. Few rows stay empty.
"""

import fractions
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Positions(NamedTuple):
    """Places of assignments in the queues of their experts.

    Attributes:
      place: Assignments of the same group to the same expert that come before.
      kept: Which assignments find capacity.
      taken: Assignments of each group to each expert that are kept.
    """

    place: Int[Array, "groups tokens selected"]
    kept: Bool[Array, "groups tokens selected"]
    taken: Int[Array, "groups experts"]


class Slots(NamedTuple):
    """Which row an assignment has, and the inverse.

    Indices run over all the groups that were assigned together, so they mean
    something only to ``dispatch`` and ``combine`` of the same groups.

    Attributes:
      row: Row of each assignment, -1 where it was dropped.
      assignment: Flattened ``[groups tokens selected]`` assignment in each row, -1
        where the row is empty.
    """

    row: Int[Array, "groups tokens selected"]
    assignment: Int[Array, "*rows"]


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
    # As it is written in decimals: its last bits are not to add a slot.
    factor = fractions.Fraction(str(capacity_factor))
    capacity = math.ceil(factor * num_selected * num_tokens / num_experts)
    if capacity < 1:
        raise ValueError(
            f"capacity_factor={capacity_factor} gives {num_experts} experts no slot "
            f"for {num_tokens} tokens; make it positive, or None for no limit."
        )
    return min(capacity, num_tokens)


def queue(
    expert_index: Int[Array, "groups tokens selected"],
    num_experts: int,
    capacity: int,
    priority: Float[Array, "groups tokens"] | None = None,
) -> Positions:
    """Lines assignments up before their experts.

    All first choices of a group come before any second choice, and so on; among equal
    choices the token of higher priority comes first, then the earlier one.

    Args:
      expert_index: Experts of each token, the best first. An index that is no expert's
        waits for nobody and is not kept.
      num_experts: Number of experts.
      capacity: Assignments that each expert takes of each group.
      priority: Priority of each token, or None.
    """
    num_groups, num_tokens, num_selected = expert_index.shape
    order = None if priority is None else jnp.argsort(-priority, axis=1)
    by_choice = _reorder(expert_index, order).swapaxes(1, 2).reshape(num_groups, -1)
    chosen = jax.nn.one_hot(by_choice, num_experts, dtype=jnp.int32)
    waiting = jnp.cumsum(chosen, axis=1)
    place = jnp.sum(waiting * chosen, axis=-1) - 1
    place = place.reshape(num_groups, num_selected, num_tokens).swapaxes(1, 2)
    place = _reorder(place, None if order is None else jnp.argsort(order, axis=1))
    return Positions(
        place,
        (place >= 0) & (place < capacity),
        jnp.minimum(waiting[:, -1], capacity),
    )


def _reorder(
    values: Int[Array, "groups tokens selected"],
    order: Int[Array, "groups tokens"] | None,
) -> Int[Array, "groups tokens selected"]:
    if order is None:
        return values
    return jnp.take_along_axis(values, order[..., None], axis=1)


def in_buffers(
    expert_index: Int[Array, "groups tokens selected"],
    positions: Positions,
    capacity: int,
) -> Slots:
    """Rows in buffers ``[experts groups capacity]``; see the module.

    The ``assignment`` of the result has shape ``[groups experts capacity]``.
    """
    num_groups, num_experts = positions.taken.shape
    group = jax.lax.broadcasted_iota(jnp.int32, expert_index.shape, 0)
    row = (expert_index * num_groups + group) * capacity + positions.place
    row = jnp.where(positions.kept, row, -1)
    assignment = _invert(row, num_experts * num_groups * capacity)
    shape = (num_experts, num_groups, capacity)
    return Slots(row, assignment.reshape(shape).swapaxes(0, 1))


def in_order(
    expert_index: Int[Array, "groups tokens selected"],
    positions: Positions,
    sizes: tuple[int, ...],
) -> tuple[Slots, Int[Array, " experts"]]:
    """Rows sorted by expert; see the module.

    Args:
      expert_index: Experts of each token.
      positions: Their places in the queues.
      sizes: Sizes of the blocks that each expert's rows are padded to, ascending.

    Returns:
      The slots, and the number of rows of each expert without padding. The rows behind
      the last expert's are empty too: there are as many as there could be.
    """
    num_groups, num_experts = positions.taken.shape
    count = jnp.sum(positions.taken, axis=0)
    padded = padded_count(count, sizes)
    first = jnp.cumsum(padded) - padded
    before = jnp.cumsum(positions.taken, axis=0) - positions.taken + first[None]
    clipped = jnp.clip(expert_index, 0, num_experts - 1)
    group = jax.lax.broadcasted_iota(jnp.int32, expert_index.shape, 0)
    row = before[group, clipped] + positions.place
    row = jnp.where(positions.kept, row, -1)
    num_tokens, num_selected = expert_index.shape[1:]
    # As many as there could be: no token goes to an expert twice.
    most = num_groups * num_tokens * min(num_selected, num_experts)
    return Slots(row, _invert(row, most_padded(most, num_experts, sizes))), count


def most_padded(num_rows: int, num_experts: int, sizes: tuple[int, ...]) -> int:
    """Rows of all experts' blocks at most, however `num_rows` are shared out.

    See `padded_count`, whose blocks can leave as many rows empty as sizes lie apart.
    """
    empty = max(b - a for a, b in itertools.pairwise((0, *sizes))) - 1
    unit = math.gcd(*sizes)
    return (num_rows + num_experts * empty) // unit * unit


def padded_count(
    count: Int[Array, " experts"], sizes: tuple[int, ...]
) -> Int[Array, " experts"]:
    """Rows of each expert's blocks: as many of the largest as are full, and one more.

    Args:
      count: Rows of each expert.
      sizes: Sizes of blocks, ascending.
    """
    return num_full(count, sizes) * sizes[-1] + jnp.where(
        count > 0, jnp.asarray(sizes, count.dtype)[last_block(count, sizes)], 0
    )


def num_full(
    count: Int[Array, " experts"], sizes: tuple[int, ...]
) -> Int[Array, " experts"]:
    """Blocks of the largest size before each expert's last block."""
    return jnp.maximum(count - 1, 0) // sizes[-1]


def last_block(
    count: Int[Array, " experts"], sizes: tuple[int, ...]
) -> Int[Array, " experts"]:
    """Which size each expert's last block has."""
    left = count - num_full(count, sizes) * sizes[-1]
    larger = left[:, None] > jnp.asarray(sizes, count.dtype)[None]
    return jnp.sum(larger, axis=1, dtype=count.dtype)


def _invert(row: Int[Array, "..."], num_rows: int) -> Int[Array, " rows"]:
    empty = jnp.full(num_rows, -1, row.dtype)
    return empty.at[row.reshape(-1)].set(
        jnp.arange(row.size, dtype=row.dtype), mode="drop", wrap_negative_indices=False
    )


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
    tokens: Float[Array, "groups tokens *selected width"], slots: Slots
) -> Float[Array, "rows width"]:
    """Copies tokens into the rows of their assignments; empty rows are zero.

    Rows of buffers are in the order ``[experts groups capacity]``.

    Args:
      tokens: A row for each token, or one for each of its assignments.
      slots: The rows of the assignments.
    """
    width = tokens.shape[-1]
    uses = slots.row.shape[-1] if tokens.ndim == 3 else 1
    return take_rows(
        tokens.reshape(-1, width), _by_row(slots) // uses, slots.row.reshape(-1, uses)
    )


def combine(
    rows: Float[Array, "rows width"],
    weight: Float[Array, "groups tokens selected"] | None,
    slots: Slots,
) -> Float[Array, "groups tokens *selected width"]:
    """Adds up the outputs of each token's experts by weight; dropped ones are zero.

    Without weights they are returned one by one.
    """
    outputs = take_rows(rows, slots.row.reshape(-1), _by_row(slots)[:, None])
    outputs = outputs.reshape(*slots.row.shape, rows.shape[-1])
    if weight is None:
        return outputs
    return jnp.sum(outputs * weight[..., None].astype(outputs.dtype), axis=2)


def _by_row(slots: Slots) -> Int[Array, " rows"]:
    """The assignment of each row, in the order of the rows."""
    assignment = slots.assignment
    if assignment.ndim == 3:
        assignment = assignment.swapaxes(0, 1)
    return assignment.reshape(-1)


def one_hot_mask(
    expert_index: Int[Array, "groups tokens selected"],
    positions: Positions,
    capacity: int,
) -> Bool[Array, "groups tokens selected experts capacity"]:
    """Which assignment lies in which row of the buffers, as a mask.

    Products with it do what ``dispatch`` and ``combine`` do, at a cost that grows with
    the square of the group (GShard; Lepikhin et al., 2021).
    """
    num_experts = positions.taken.shape[1]
    expert = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.bool_)
    place = jax.nn.one_hot(positions.place, capacity, dtype=jnp.bool_)
    mask = expert[..., :, None] & place[..., None, :]
    return mask & positions.kept[..., None, None]
