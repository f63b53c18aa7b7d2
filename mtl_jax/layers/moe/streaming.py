"""Experts that come to the device one after another, from the host's memory.

M³ViT's order of computation (Fan et al., 2022): all tokens are routed first, their rows
sorted by expert; then, expert by expert, one computes its rows while the next one's
parameters are on their way. However many experts a layer has, two of them are on the
device at a time. Experts of which it is known that they will be used can stay there,
and only the others come when a token wants them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtl_jax.layers.moe import dispatch
from mtl_jax.layers.moe.dispatcher import Dispatcher, run_dispatcher
from mtl_jax.layers.moe.experts import expert_stages
from mtl_jax.layers.moe.grouped import Stage, linear
from mtl_jax.layers.moe.layer import MoE
from mtl_jax.layers.moe.record import record, record_dispatcher
from mtl_jax.layers.moe.routing import Routing
from mtl_jax.sharding import expert_parallel

HOST = "pinned_host"
"""Memory of the host from which devices can read by themselves."""

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 256
"""Rows that an expert computes at a time."""

MISSING = "missing_experts"
"""Statistic of a layer: which experts were wanted, but are nowhere."""


class PlacedExperts(NamedTuple):
    """The parameters of a layer's experts, each in one of two memories, or in none.

    Attributes:
      resident: Experts on the device, with a leading axis over them.
      waiting: Experts in the host's memory, likewise.
      place: Where each expert is: its index in ``resident``, or, after those, in
        ``waiting``; -1 where it is in neither.
    """

    resident: PyTree
    waiting: PyTree
    place: Int[Array, " experts"]


def place_experts(
    experts: PyTree,
    resident: Sequence[int],
    *,
    others: Literal["host", "nowhere"] = "host",
    device: Any = None,
) -> PlacedExperts:
    """Puts some experts on the device, and the others in the host's memory or nowhere.

    Args:
      experts: Parameters of all experts of a layer, with a leading axis over them: of
        NumPy, or on any device.
      resident: Which ones the device is to hold.
      others: Whether the other ones wait in the host's memory, or are left out.
      device: The device; JAX's first by default.

    Raises:
      ValueError: If there is no such expert.
    """
    num_experts = jax.tree.leaves(experts)[0].shape[0]
    unknown = sorted(set(resident) - set(range(num_experts)))
    if unknown:
        raise ValueError(
            f"resident names expert {unknown[0]}, but the layer has {num_experts}, "
            "counted from 0"
        )
    device = device or jax.local_devices()[0]
    here = sorted(set(resident))
    rest = [e for e in range(num_experts) if e not in here] if others == "host" else []
    place = np.full(num_experts, -1, np.int32)
    place[here + rest] = np.arange(len(here) + len(rest))

    def put(indices: list[int], memory: str | None) -> PyTree:
        sharding = SingleDeviceSharding(device, memory_kind=memory)
        return jax.tree.map(
            lambda leaf: jax.device_put(np.asarray(leaf)[indices], sharding), experts
        )

    return PlacedExperts(
        put(here, None), put(rest, HOST), jax.device_put(place, device)
    )


def apply_placed(
    stages: Sequence[Stage],
    experts: PlacedExperts,
    rows: Float[Array, "rows width"],
    count: Int[Array, " experts"],
    block: int,
) -> Float[Array, "rows features"]:
    """Applies experts to their own rows, first those on the device, then the others.

    Only experts that have rows are touched. While one of those from the host computes,
    the next is copied.

    Args:
      stages: What an expert does.
      experts: Its parameters.
      rows: Rows sorted by expert, zero where padded.
      count: Rows of each expert, a multiple of ``block``.
      block: Rows that are computed at a time.

    Returns:
      The experts' outputs; zero where an expert is nowhere.
    """
    start = jnp.cumsum(count) - count
    num_resident, num_waiting = (
        jax.tree.leaves(part)[0].shape[0] for part in experts[:2]
    )
    outputs = _empty_outputs(stages, experts, rows)

    def apply(parameters: PyTree, expert: Array, outputs: Array) -> Array:
        def one(i: Array, outputs: Array) -> Array:
            at = start[expert] + i * block
            value: PyTree = jax.lax.dynamic_slice_in_dim(rows, at, block)
            for stage in stages:
                value = stage(parameters, value, linear)
            return jax.lax.dynamic_update_slice_in_dim(outputs, value, at, 0)

        return jax.lax.fori_loop(0, count[expert] // block, one, outputs)

    used = count > 0
    if num_resident:
        here = used & (experts.place >= 0) & (experts.place < num_resident)
        order = _first(here)

        def at_hand(i: Array, outputs: Array) -> Array:
            parameters = _cast(
                _take(experts.resident, experts.place[order[i]]), rows.dtype
            )
            return apply(parameters, order[i], outputs)

        outputs = jax.lax.fori_loop(0, jnp.sum(here), at_hand, outputs)
    if num_waiting:
        there = used & (experts.place >= num_resident)
        order, number = _first(there), jnp.sum(there)

        def fetch(i: Array | int) -> PyTree:
            # Nothing is wanted of the host where every expert is at hand; what is
            # then fetched in vain is one expert.
            index = jnp.maximum(experts.place[order[i]] - num_resident, 0)
            return jax.device_put(
                _take(experts.waiting, index), jax.memory.Space.Device
            )

        def step(i: Array, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            parameters, outputs = carry
            # Before the products, which do not need it, so that both can overlap.
            following = fetch(i + 1)
            return following, apply(_cast(parameters, rows.dtype), order[i], outputs)

        last, outputs = jax.lax.fori_loop(0, number - 1, step, (fetch(0), outputs))
        outputs = jax.lax.fori_loop(
            0,
            jnp.minimum(number, 1),
            lambda _, outputs: apply(
                _cast(last, rows.dtype), order[jnp.maximum(number - 1, 0)], outputs
            ),
            outputs,
        )
    return outputs


def _first(chosen: Bool[Array, " experts"]) -> Int[Array, " experts"]:
    """Indices of the chosen experts, then those of the others."""
    return jnp.argsort(~chosen, stable=True)


def _take(parameters: PyTree, index: Array) -> PyTree:
    return jax.tree.map(
        lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), parameters
    )


def _cast(parameters: PyTree, dtype: jnp.dtype) -> PyTree:
    return jax.tree.map(lambda p: p.astype(dtype), parameters)


def _empty_outputs(
    stages: Sequence[Stage], experts: PlacedExperts, rows: Array
) -> Array:
    def whole(parameters: PyTree, rows: Array) -> Array:
        value: PyTree = rows
        for stage in stages:
            value = stage(_cast(parameters, rows.dtype), value, linear)
        return value

    one = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), experts.resident
    )
    output = jax.eval_shape(whole, one, jax.ShapeDtypeStruct(rows.shape, rows.dtype))
    return jnp.zeros(output.shape, output.dtype)


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """Within, layers whose ``experts`` parameters are `PlacedExperts` run by them.

    A layer also gives the statistic ``missing_experts``: for each expert, how many
    assignments it had that could not be computed as the expert is nowhere. Their share
    of the output is zero, so whoever leaves experts out must look at it.

    Raises:
      ValueError: If the mesh now set splits examples or experts over devices; or, as a
        layer is applied, if its router leaves no choice of experts to tokens.
    """

    def intercept(
        call: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if isinstance(module, MoE) and context.method_name == "_apply_experts":
            experts = module.variables["params"]["experts"]
            if isinstance(experts, PlacedExperts):
                return _apply_experts(module, experts, *arguments, **keywords)
        return call(*arguments, **keywords)

    sizes = expert_parallel.axis_sizes()
    if sizes:
        raise ValueError(
            f"the mesh splits examples or experts over {sizes}, but experts come from "
            "the host to one device; leave jax.set_mesh"
        )
    with nn.intercept_methods(intercept):
        yield


def _apply_experts(
    module: MoE,
    experts: PlacedExperts,
    groups: Float[Array, "groups tokens width"],
    decision: Routing | Dispatcher,
    capacity_factor: float | None,
    fewest: int,
) -> Float[Array, "groups tokens width"]:
    """What the layer itself does, with experts wherever they are."""
    expert = module.expert(
        hidden=module.expert_hidden, dtype=module.dtype, name="experts"
    )
    # The parameters are those that were placed, whatever their containers.
    stages, _ = expert_stages(
        expert, module.num_experts, groups.shape[-1], module.dtype
    )
    if not isinstance(decision, Routing):
        if jax.tree.leaves(experts.resident)[0].shape[0] < module.num_experts:
            where = "/".join(module.path) or "the layer"
            raise ValueError(
                f"the router of {where} fills the buffers of all experts, so none can "
                "be left out; keep all of them on the device"
            )
        record_dispatcher(module, decision)
        parameters = _cast(experts.resident, groups.dtype)
        return run_dispatcher(stages, parameters, groups, decision)
    num_tokens = groups.shape[1]
    capacity = num_tokens
    if capacity_factor is not None:
        capacity = dispatch.slots_per_expert(
            num_tokens, module.num_experts, module.num_selected, capacity_factor
        )
    positions = dispatch.queue(
        decision.expert_index, module.num_experts, capacity, decision.priority
    )
    block = _block_size(decision.expert_index.shape, fewest)
    slots, count = _in_blocks(decision.expert_index, positions, block)
    rows = dispatch.dispatch(groups, slots)
    outputs = apply_placed(stages, experts, rows, count, block)
    wanted = jnp.sum(positions.taken, axis=0)
    record(module, decision, 1.0 - jnp.mean(positions.kept.astype(jnp.float32)))
    module.sow(
        "statistics",
        MISSING,
        jnp.where(experts.place < 0, wanted, 0),
        reduce_fn=lambda _, new: new,
        init_fn=lambda: jnp.zeros((), jnp.int32),
    )
    return dispatch.combine(outputs, decision.weight, slots)


def _block_size(shape: Sequence[int], num_experts: int) -> int:
    """Rows of a block for assignments ``[groups tokens selected]``.

    A half to a quarter of an expert's even share, so that few rows stay empty; of one
    group's, where there may be any number of groups.
    """
    if jax.export.is_symbolic_dim(shape[0]):
        shape = shape[1:]
    share = max(math.prod(shape) // num_experts, 2 * SMALLEST_BLOCK)
    return min(2 ** (share.bit_length() - 2), LARGEST_BLOCK)


def _in_blocks(
    expert_index: Int[Array, "groups tokens selected"],
    positions: dispatch.Positions,
    block: int,
) -> tuple[dispatch.Slots, Int[Array, " experts"]]:
    """Rows sorted by expert, and how many each has, padded to whole blocks."""
    num_experts = positions.taken.shape[1]
    expert = jnp.where(positions.kept, expert_index, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    expert = expert[order]
    taken = jnp.sum(positions.taken, axis=0)
    count = (taken + block - 1) // block * block
    padding = jnp.cumsum(count - taken) - (count - taken)
    row = jnp.arange(expert.size, dtype=order.dtype)
    row = row + padding.at[expert].get(mode="clip")
    # Assignments that are not kept come last, behind all rows.
    num_rows = (expert.size + num_experts * (block - 1)) // block * block
    target = jnp.where(expert < num_experts, row, num_rows)
    assignment = jnp.full(num_rows, -1, order.dtype).at[target].set(order, mode="drop")
    rows = jnp.where(expert < num_experts, row, -1)
    rows = jnp.zeros_like(row).at[order].set(rows).reshape(expert_index.shape)
    return dispatch.Slots(rows, assignment), count
