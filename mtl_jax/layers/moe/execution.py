"""How a layer of experts is carried out: exchange, layout of rows, matrix products.

All ways compute the same; which is fastest follows from shapes, mesh and platform.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtl_jax.layers.moe import dispatch, grouped, grouped_matmul, ragged
from mtl_jax.layers.moe.experts import apply_buffers
from mtl_jax.layers.moe.grouped import Stage
from mtl_jax.layers.moe.routing import Routing
from mtl_jax.sharding import expert_parallel

ROWS_THAT_FILL_BLOCKS = 192
"""Rows an expert below which buffers beat blocks on a CPU (`benchmarks/moe.py`)."""


class Execution(NamedTuple):
    """One way to carry out a layer.

    Attributes:
      exchange: How tokens reach experts on other devices: ``"all_to_all"`` sends
        buffers; ``"all_gather"`` gathers tokens and scatters sums of outputs, with no
        need of a capacity; ``"ragged_all_to_all"`` sends sorted rows, as many as there
        are, on TPUs and GPUs.
      layout: ``"buffers"``, the same by products with ``"one_hot"`` masks, or
        ``"sorted"``; see `mtl_jax.layers.moe.dispatch`.
      matmul: On sorted rows, ``"blocks"`` of one expert each, or a grouped matrix
        product of `mtl_jax.layers.moe.grouped_matmul`.
    """

    exchange: Literal["all_to_all", "all_gather", "ragged_all_to_all"]
    layout: Literal["buffers", "one_hot", "sorted"]
    matmul: Literal["blocks", "megablox", "hopper", "ragged_dot"] = "blocks"


def choose(
    *,
    num_assignments: int,
    num_experts: int,
    num_selected: int,
    capacity_factor: float | None,
    uses_matmuls: bool,
    parameters: PyTree,
    asked: Execution | None = None,
) -> Execution:
    """The way that is fastest for these shapes on the mesh now set.

    Args:
      num_assignments: Assignments of all groups on all devices.
      num_experts: Number of experts.
      num_selected: Experts a token goes to.
      capacity_factor: As `mtl_jax.layers.moe.MoE` has it.
      uses_matmuls: Whether the experts consist of ``linear`` stages alone.
      parameters: Parameters of all experts, with a leading axis over them.
      asked: The way that is taken instead, where there is one.

    Raises:
      ValueError: If a part of ``asked`` is unknown, or does not go with the others or
        with the experts.
    """
    if asked is not None:
        _check(asked, uses_matmuls, parameters)
        return asked
    platform = expert_parallel.platform()
    sizes = expert_parallel.axis_sizes()
    num_devices = sizes.get(expert_parallel.EXPERT_AXIS, 1)
    limited = capacity_factor is not None
    # Bytes that leave a device: a gather sends each token to all others once, an
    # exchange of buffers sends ``num_selected · capacity_factor`` rows a token.
    gathers = not limited or num_devices < num_selected * capacity_factor
    exchange = "all_gather" if gathers else "all_to_all"
    if exchange == "all_to_all" and num_devices > 1:
        return Execution("all_to_all", "buffers")
    if platform == "cpu":
        # Devices that share the experts gather their rows; others have their own.
        apart = math.prod(sizes.values()) // num_devices
        share = num_assignments / num_experts / apart
        if limited and share < ROWS_THAT_FILL_BLOCKS:
            return Execution(exchange, "buffers")
        return Execution(exchange, "sorted")
    if limited:
        return Execution(exchange, "buffers")
    if platform == "tpu" and num_devices > num_selected:
        # Each row travels alone, where a gather sends each token to all devices.
        exchange = "ragged_all_to_all"
    if not uses_matmuls:
        return Execution(exchange, "sorted")
    split = expert_parallel.splits_within_experts()
    if platform == "tpu":
        return Execution(exchange, "sorted", "ragged_dot" if split else "megablox")
    # Two of its three products are of all rows that there is room for, as many times
    # those that there are as devices share experts; blocks take 2.8 times as long.
    few = num_devices <= 4
    if few and not split and grouped_matmul.suits_hopper(parameters):
        return Execution(exchange, "sorted", "hopper")
    return Execution(exchange, "sorted")


def _check(execution: Execution, uses_matmuls: bool, parameters: PyTree) -> None:
    """Checks that there is such a way to carry out a layer of such experts."""
    for part, known in (
        ("exchange", _WAYS),
        ("layout", _LAYOUTS),
        ("matmul", _MATMULS),
    ):
        if getattr(execution, part) not in known:
            raise ValueError(
                f"execution.{part} is {getattr(execution, part)!r}; choose from "
                f"{', '.join(known)}."
            )
    layouts = _LAYOUTS_OF_EXCHANGE.get(execution.exchange, _LAYOUTS)
    if execution.layout not in layouts:
        raise ValueError(
            f"execution.layout is {execution.layout!r}, but what "
            f"{execution.exchange!r} exchanges is {' or '.join(layouts)}; choose that, "
            "or another exchange."
        )
    if execution.matmul == "blocks":
        return
    if execution.layout != "sorted" or not uses_matmuls:
        raise ValueError(
            f"execution.matmul is {execution.matmul!r}, which takes sorted rows and "
            "experts that have stages(); leave it 'blocks', or change layout or expert."
        )
    if execution.matmul == "hopper" and not grouped_matmul.suits_hopper(parameters):
        raise ValueError(
            "execution.matmul is 'hopper', which takes a Hopper GPU, a dtype of two "
            "bytes, and a width and a number of hidden units that are multiples of "
            "128; leave it 'blocks'."
        )


def run(
    execution: Execution,
    stages: Sequence[Stage],
    parameters: PyTree,
    groups: Float[Array, "groups tokens *selected width"],
    routing: Routing,
    capacity: int,
    fewest_visible: int | None = None,
) -> tuple[Float[Array, "groups tokens *selected width"], Float[Array, ""]]:
    """The experts' weighted outputs.

    Args:
      execution: How.
      stages: What an expert does.
      parameters: Parameters of all experts, with a leading axis over them.
      groups: Tokens, in the dtype of the experts; or a row for each assignment.
      routing: Where they go. Where its ``weight`` is None, outputs are not added up but
        returned for each assignment.
      capacity: Assignments that an expert takes of each group.
      fewest_visible: The least number of experts that some task sees; by default all.
        Blocks of sorted rows have the sizes that suit so many: tasks that do not see
        what was added then compute what they did before, to the last bit.

    Returns:
      The outputs, and the fraction of assignments that found no capacity.
    """
    if fewest_visible is None:
        fewest_visible = jax.tree.leaves(parameters)[0].shape[0]
    alone = expert_parallel.num_expert_parts() == 1
    way = _gathering if alone else _WAYS[execution.exchange]
    output, kept = way(
        execution, stages, parameters, groups, routing, capacity, fewest_visible
    )
    return output, 1.0 - jnp.mean(kept)


def _exchanging(execution, stages, parameters, groups, routing, capacity, _):
    """Each device fills buffers for all experts; buffers travel to them and back."""
    num_experts = jax.tree.leaves(parameters)[0].shape[0]
    fill, empty = _FILLING[execution.layout]

    def send(groups, expert_index, priority):
        positions = dispatch.queue(expert_index, num_experts, capacity, priority)
        buffers, slots = fill(groups, expert_index, positions, capacity)
        return buffers, slots, positions.kept.astype(jnp.float32)

    buffers, slots, kept = expert_parallel.map_groups(
        send, in_axes=(0, 0, 0), out_axes=(1, 0, 0)
    )(groups, routing.expert_index, routing.priority)
    buffers = apply_buffers(stages, parameters, expert_parallel.exchange(buffers))
    output = expert_parallel.map_groups(empty, in_axes=(1, 0, 0), out_axes=0)(
        expert_parallel.exchange_back(buffers), routing.weight, slots
    )
    return output, kept


def _gathering(
    execution, stages, parameters, groups, routing, capacity, fewest_visible
):
    """Each device applies its experts to all tokens of the devices that share them."""
    parts = expert_parallel.num_expert_parts()

    def local(parameters, groups, expert_index, weight, priority):
        num_experts = jax.tree.leaves(parameters)[0].shape[0]
        first = expert_parallel.expert_part() * num_experts
        # An index that is no expert's here is dropped here.
        expert_index = expert_index - first
        positions = dispatch.queue(expert_index, num_experts, capacity, priority)
        kept = positions.kept.astype(jnp.float32)
        if execution.layout == "sorted":
            # Here are the assignments to the other devices' experts too.
            expected = expert_index.size // parts
            apply, sizes = _on_sorted_rows(
                execution, expected, fewest_visible / parts, groups.shape[0] * capacity
            )
            slots, count = dispatch.in_order(expert_index, positions, sizes)
            rows = dispatch.dispatch(groups, slots)
            rows = apply(stages, parameters, rows, count)
            return dispatch.combine(rows, weight, slots), kept
        fill, empty = _FILLING[execution.layout]
        buffers, slots = fill(groups, expert_index, positions, capacity)
        return empty(apply_buffers(stages, parameters, buffers), weight, slots), kept

    return expert_parallel.map_experts(local)(
        parameters,
        groups,
        routing.expert_index,
        routing.weight,
        routing.priority,
    )


def _sending(execution, stages, parameters, groups, routing, capacity, fewest_visible):
    """Each device sends the rows of its tokens to their experts, sorted."""
    num_experts = jax.tree.leaves(parameters)[0].shape[0]
    parts = expert_parallel.num_expert_parts()

    def local(parameters, groups, expert_index, weight, priority):
        positions = dispatch.queue(expert_index, num_experts, capacity, priority)
        slots, count = dispatch.in_order(expert_index, positions, (1,))
        rows = dispatch.dispatch(groups, slots)
        num_received = parts * rows.shape[0]
        apply, sizes = _on_sorted_rows(
            execution,
            num_received // parts,
            fewest_visible / parts,
            parts * groups.shape[0] * capacity,
        )
        planned = ragged.plan(count, sizes)
        num_received = dispatch.most_padded(num_received, num_experts // parts, sizes)
        received = ragged.to_experts(rows, planned, num_received)
        outputs = apply(stages, parameters, received, planned.total)
        rows = ragged.to_tokens(outputs, planned, rows.shape[0])
        kept = positions.kept.astype(jnp.float32)
        return dispatch.combine(rows, weight, slots), kept

    return expert_parallel.map_experts(local, gather=False)(
        parameters,
        groups,
        routing.expert_index,
        routing.weight,
        routing.priority,
    )


def _on_sorted_rows(
    execution: Execution, num_rows: int, num_experts: float, most: int
) -> tuple[Callable, tuple[int, ...]]:
    """What applies experts to sorted rows, and the sizes it wants them padded to.

    Args:
      execution: How.
      num_rows: Rows to expect.
      num_experts: Experts that they are for at least, on average over devices.
      most: Rows that one of them can have at most.
    """
    num_rows = min(num_rows, math.floor(num_experts * most))
    if execution.matmul == "blocks":
        sizes = grouped.block_sizes(num_rows, num_experts, most)
        apply = functools.partial(grouped.apply_blocks, sizes=sizes, num_rows=num_rows)
        return apply, sizes
    tile = grouped_matmul.row_tile(num_rows, num_experts)
    matmul, sizes = {
        "megablox": (functools.partial(grouped_matmul.megablox, tile=tile), (tile,)),
        "hopper": (grouped_matmul.hopper, (1,)),
        "ragged_dot": (grouped_matmul.ragged_dot, (1,)),
    }[execution.matmul]
    apply = functools.partial(
        grouped.apply_matmuls, grouped_matmul=matmul, sizes=sizes, num_rows=num_rows
    )
    return apply, sizes


def _fill_buffers(groups, expert_index, positions, capacity):
    slots = dispatch.in_buffers(expert_index, positions, capacity)
    num_groups, num_experts = positions.taken.shape
    rows = dispatch.dispatch(groups, slots)
    return rows.reshape(num_experts, num_groups, capacity, groups.shape[-1]), slots


def _empty_buffers(buffers, weight, slots):
    return dispatch.combine(buffers.reshape(-1, buffers.shape[-1]), weight, slots)


def _fill_by_mask(groups, expert_index, positions, capacity):
    mask = dispatch.one_hot_mask(expert_index, positions, capacity)
    given = "gsd" if groups.ndim == 3 else "gskd"
    return jnp.einsum(f"gskec,{given}->egcd", mask.astype(groups.dtype), groups), mask


def _empty_by_mask(buffers, weight, mask):
    mask = mask.astype(buffers.dtype)
    if weight is None:
        return jnp.einsum("gskec,egcd->gskd", mask, buffers)
    weight = weight.astype(buffers.dtype)
    return jnp.einsum("gsk,gskec,egcd->gsd", weight, mask, buffers)


_FILLING: dict[str, tuple[Callable, Callable]] = {
    "buffers": (_fill_buffers, _empty_buffers),
    "one_hot": (_fill_by_mask, _empty_by_mask),
}

_WAYS: dict[str, Callable] = {
    "all_to_all": _exchanging,
    "all_gather": _gathering,
    "ragged_all_to_all": _sending,
}

_LAYOUTS = (*_FILLING, "sorted")
_LAYOUTS_OF_EXCHANGE = {
    "all_to_all": tuple(_FILLING),
    "ragged_all_to_all": ("sorted",),
}
_MATMULS = ("blocks", "megablox", "hopper", "ragged_dot")
