"""Experts on sorted rows: a loop over blocks of rows, or grouped matrix products.

An expert is a sequence of *stages*, pure functions of one expert's parameters and a
block of rows. What passes between stages is kept for the backward pass; what is
computed within one is computed again there, so a stage should begin cheaply and end
with a matrix product.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from mtl_jax.flops import counted, stated
from mtl_jax.layers.moe import dispatch

ROUNDING = 8
"""Sizes of blocks are multiples of this."""

PARTS = (1 / 2, 3 / 4, 7 / 8, 1, 9 / 8, 5 / 4, 3 / 2)
"""Sizes of blocks in units of an even share of the rows."""

Linear = Callable[[Array, PyTree], Array]
"""``(rows, {"kernel", "bias"}) -> rows``; without ``bias`` where there is none."""

Stage = Callable[[PyTree, PyTree, Linear], PyTree]
"""``(parameters, rows, linear) -> rows``; every leaf has one row a row."""


def linear(
    rows: Float[Array, "*rows width"], parameters: PyTree
) -> Float[Array, "*rows features"]:
    """``rows @ kernel + bias`` of one expert, in the dtype of the rows."""
    product = rows @ parameters["kernel"]
    bias = parameters.get("bias")
    return (
        product
        if bias is None
        else product + bias.reshape((1,) * (product.ndim - 1) + bias.shape)
    )


def block_sizes(num_rows: int, num_experts: float, most: int) -> tuple[int, ...]:
    """Sizes of the blocks that suit so many rows on so many experts.

    They lie closely around an expert's even share: one block then holds most experts'
    rows, with few empty ones, and every parameter's gradient is added up once.

    Args:
      num_rows: Assignments in all.
      num_experts: Number of experts; not a whole number where it is an average.
      most: Rows that an expert can have at most.

    Returns:
      The sizes, ascending.
    """
    share = num_rows / num_experts
    sizes = (min(part * share, most) / ROUNDING for part in PARTS)
    return tuple(sorted({math.ceil(size) * ROUNDING for size in sizes}))


def apply_blocks(
    stages: Sequence[Stage],
    parameters: PyTree,
    rows: Float[Array, "rows width"],
    count: Int[Array, " experts"],
    sizes: tuple[int, ...],
    num_rows: int,
) -> Float[Array, "rows features"]:
    """Applies each expert to its own rows, block by block.

    The number of blocks is that of the rows that are there, so that uneven load costs
    no more than even load. Can be differentiated in reverse mode alone.

    Args:
      stages: What an expert does.
      parameters: Its parameters, with a leading axis over experts.
      rows: Rows sorted by expert, each expert's as many as `dispatch.padded_count`
        says; zero where padded.
      count: Rows of each expert without padding.
      sizes: Sizes of blocks, ascending.
      num_rows: Rows of all experts to expect, for `mtl_jax.flops.count_flops`.

    Returns:
      The experts' outputs; zero behind the last expert's rows.
    """
    blocks = _Blocks(tuple(sizes), num_rows)
    return _apply_blocks(tuple(stages), blocks, parameters, rows, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply_blocks(stages, blocks, parameters, rows, count):
    return _forward(stages, blocks, parameters, rows, count)[0]


def _forward(stages, blocks, parameters, rows, count):
    def body(block: "_Block", outputs: list[PyTree]) -> list[PyTree]:
        mine = block.expert_of(parameters)
        value, written = block.of(rows), []
        for stage, output in zip(stages, outputs, strict=True):
            value = stage(mine, value, linear)
            written.append(block.write(output, value))
        return written

    # What passes between stages is kept; the last is the result.
    outputs = blocks.each(count, body, _stage_outputs(stages, parameters, rows))
    return outputs[-1], (parameters, rows, outputs[:-1], count)


def _backward(stages, blocks, residuals, cotangent):
    parameters, rows, between, count = residuals
    inputs = [rows, *between]

    def body(block: "_Block", carry):
        rows_gradient, gradients = carry
        mine = block.expert_of(parameters)
        pulled, mine_gradient = block.of(cotangent), None
        for stage, value in zip(reversed(stages), reversed(inputs), strict=True):
            _, pull_back = jax.vjp(
                lambda mine, value, stage=stage: stage(mine, value, linear),
                mine,
                block.of(value),
            )
            gradient, pulled = pull_back(pulled)
            mine_gradient = (
                gradient
                if mine_gradient is None
                else jax.tree.map(jnp.add, mine_gradient, gradient)
            )
        return (
            block.write(rows_gradient, pulled),
            block.give_expert(gradients, mine_gradient),
        )

    rows_gradient, gradients = blocks.each(
        count, body, (_zeros_like(rows), _zeros_like(parameters))
    )
    return gradients, rows_gradient, None


_apply_blocks.defvjp(_forward, _backward)


class _Block:
    """One block: which rows, whose they are, and whether it is that expert's first."""

    def __init__(self, size: int, start: Array, expert: Array, first: bool):
        self.size, self.start, self.expert, self.first = size, start, expert, first

    def of(self, rows: PyTree) -> PyTree:
        return jax.tree.map(
            lambda r: jax.lax.dynamic_slice_in_dim(r, self.start, self.size), rows
        )

    def write(self, rows: PyTree, block: PyTree) -> PyTree:
        return jax.tree.map(
            lambda r, b: jax.lax.dynamic_update_slice_in_dim(r, b, self.start, 0),
            rows,
            block,
        )

    def expert_of(self, parameters: PyTree) -> PyTree:
        return jax.tree.map(
            lambda p: jax.lax.dynamic_index_in_dim(p, self.expert, keepdims=False),
            parameters,
        )

    def give_expert(self, totals: PyTree, given: PyTree) -> PyTree:
        """Adds to what the expert has; the first block saves reading that."""

        def give(total: Array, more: Array) -> Array:
            if not self.first:
                more += jax.lax.dynamic_index_in_dim(total, self.expert, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(total, more, self.expert, 0)

        return jax.tree.map(give, totals, given)


class _Blocks(NamedTuple):
    """Sizes of blocks, ascending, and the rows to expect in all."""

    sizes: tuple[int, ...]
    num_rows: int

    def each(
        self,
        count: Int[Array, " experts"],
        body: Callable[[_Block, Any], Any],
        carry: Any,
    ) -> Any:
        """Runs ``body`` for every block, one size after another.

        Of each expert, the last block comes first: it may have any size, and most
        experts have no other. There is a loop for each size rather than one that
        switches between them, as XLA would copy what a switch changes.
        """
        sizes = self.sizes
        padded = dispatch.padded_count(count, sizes)
        full = dispatch.num_full(count, sizes)
        start, last = jnp.cumsum(padded) - padded, dispatch.last_block(count, sizes)
        last_start = start + full * sizes[-1]

        def run(carry, size, blocks, start, first, times):
            done = jnp.cumsum(blocks)

            def one(i, carry):
                expert = jnp.sum(done <= i, dtype=jnp.int32)
                earlier = done[expert] - blocks[expert]
                row = start[expert] + (i - earlier) * size
                return body(_Block(size, row, expert, first), carry)

            def loop(carry):
                return jax.lax.fori_loop(0, done[-1], one, carry)

            return counted(loop, times)(carry)

        none, all_rows = Fraction(0), Fraction(self.num_rows, sizes[-1])
        for i, size in enumerate(sizes):
            blocks = ((last == i) & (count > 0)).astype(count.dtype)
            carry = run(carry, size, blocks, last_start, True, none)
        return run(carry, sizes[-1], full, start, False, all_rows)


def _stage_outputs(
    stages: Sequence[Stage], parameters: PyTree, rows: Array
) -> list[PyTree]:
    """Zeros of the shape of what every stage gives for all rows."""
    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), parameters)
    value: PyTree = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    outputs = []
    for stage in stages:
        value = jax.eval_shape(
            lambda mine, value, stage=stage: stage(mine, value, linear), one, value
        )
        outputs.append(_zeros_like(value))
    return outputs


def _zeros_like(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


@jax.custom_vjp
def _of_owner(
    bias: Float[Array, "experts features"], owner: Int[Array, " rows"]
) -> Float[Array, "rows features"]:
    """``bias[owner]``, whose gradient adds rows up by a product, not one by one."""
    return bias[owner]


def _of_owner_forward(bias: Array, owner: Array):
    return bias[owner], (owner, bias.shape[0])


def _of_owner_backward(residuals, cotangent: Array):
    owner, num_experts = residuals
    mask = jax.nn.one_hot(owner, num_experts, dtype=cotangent.dtype, axis=0)
    # In truth additions: they do not count, and lose nothing.
    add = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return stated(add, 0)(mask, cotangent), None


_of_owner.defvjp(_of_owner_forward, _of_owner_backward)


def expert_of_row(count: Int[Array, " experts"], num_rows: int) -> Int[Array, " rows"]:
    """Expert of each sorted row; that of the last expert behind all rows."""
    row = jnp.arange(num_rows, dtype=count.dtype)
    index = jnp.searchsorted(jnp.cumsum(count), row, side="right")
    return jnp.minimum(index, count.size - 1)


GroupedMatmul = Callable[[Array, Array, Array], Array]
"""``(rows [R, i], kernels [E, i, o], rows of each expert [E]) -> rows [R, o]``."""


def apply_matmuls(
    stages: Sequence[Stage],
    parameters: PyTree,
    rows: Float[Array, "rows width"],
    count: Int[Array, " experts"],
    grouped_matmul: GroupedMatmul,
    sizes: tuple[int, ...],
    num_rows: int,
) -> Float[Array, "rows features"]:
    """Applies each expert to its own rows by matrix products of all experts at once.

    Args:
      stages: What an expert does, with all its parameters used by ``linear``.
      parameters: Its parameters, with a leading axis over experts.
      rows: Rows sorted by expert, each expert's as many as `dispatch.padded_count`
        says; zero where padded.
      count: Rows of each expert without padding.
      grouped_matmul: Multiplies each row with the kernel of its expert.
      sizes: What each expert's rows are padded to; ``(1,)`` where they are not.
      num_rows: Rows of all experts to expect, for `mtl_jax.flops.count_flops`.

    Returns:
      The experts' outputs; zero behind the last expert's rows.
    """
    count = dispatch.padded_count(count, sizes)
    multiply = counted(grouped_matmul, Fraction(num_rows, rows.shape[0]))
    owner = expert_of_row(count, rows.shape[0])
    there = jnp.arange(rows.shape[0]) < jnp.sum(count)

    def of_all_experts(values: Array, weights: PyTree) -> Array:
        product = multiply(values, weights["kernel"], count)
        if "bias" in weights:
            product = product + _of_owner(weights["bias"], owner)
        # What kernels leave behind the last row is not defined.
        return jnp.where(there[:, None], product, 0)

    value: PyTree = rows
    for stage in stages:
        value = stage(parameters, value, of_all_experts)
    return value
