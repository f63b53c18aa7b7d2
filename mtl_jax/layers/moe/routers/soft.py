"""Soft mixtures: every slot of an expert is an average of tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.layers.moe.checks import check_capacity_factor, check_num_slots
from mtl_jax.layers.moe.gates import (
    KERNEL_AXES,
    GateInit,
    check_task,
    matmul_float32,
    of_task,
    parameter,
)


class SoftSlots(NamedTuple):
    """Weights between tokens and slots; a `mtl_jax.layers.moe.dispatcher.Dispatcher`.

    Attributes:
      dispatch_weight: Share of each token in each slot; they add up to 1 over tokens.
      combine_weight: Share of each slot in each token's output; they add up to 1 over
        experts and slots.
    """

    dispatch_weight: Float[Array, "groups tokens experts slots"]
    combine_weight: Float[Array, "groups tokens experts slots"]

    @property
    def probabilities(self) -> Float[Array, "groups tokens experts"]:
        """Share of each expert in each token's output."""
        return jnp.sum(self.combine_weight, axis=-1)

    @property
    def processed(self) -> Bool[Array, "groups tokens"]:
        """True: every token is in every slot."""
        return jnp.ones(self.combine_weight.shape[:2], jnp.bool_)

    def dispatch(
        self, tokens: Float[Array, "groups tokens width"]
    ) -> Float[Array, "experts groups slots width"]:
        """Averages of tokens."""
        weight = self.dispatch_weight.astype(tokens.dtype)
        return jnp.einsum("gsd,gsep->egpd", tokens, weight)

    def combine(
        self, buffers: Float[Array, "experts groups slots width"]
    ) -> Float[Array, "groups tokens width"]:
        """Averages of the slots' outputs."""
        weight = self.combine_weight.astype(buffers.dtype)
        return jnp.einsum("egpd,gsep->gsd", buffers, weight)


def soft(
    tokens: Float[Array, "groups tokens width"],
    slots: Float[Array, "width experts slots"],
    scale: Float[Array, ""],
) -> SoftSlots:
    """Soft mixture of experts (Puigcerver et al., ICLR 2024).

    The logit of a token and a slot is ``scale`` times the cosine between the token and
    the slot's vector. Each slot gets the average of the group's tokens by the softmax
    over tokens; each token gets the average of all slots' outputs by the softmax over
    slots. Nothing is dropped, nothing needs balancing, and all is differentiable.

    Args:
      tokens: Tokens of each group.
      slots: A vector for each slot of each expert, float32.
      scale: Inverse temperature, float32.
    """
    width, num_experts, num_slots = slots.shape
    directions = scale * _normalised(slots, axis=0)
    logits = matmul_float32(
        _normalised(tokens.astype(jnp.float32), axis=-1), directions.reshape(width, -1)
    )
    shape = (*tokens.shape[:2], num_experts, num_slots)
    return SoftSlots(
        jax.nn.softmax(logits, axis=1).reshape(shape),
        jax.nn.softmax(logits, axis=2).reshape(shape),
    )


def _normalised(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(squares + 1e-6)


class Soft(nn.Module):
    """The router of soft mixtures of experts; see `soft`.

    There is a parameter for each slot, so that a model is bound to the number of tokens
    in a group that it was initialised with. The cost grows with the square of that
    number; the paper has one image a group.

    Attributes:
      num_experts: Number of experts.
      num_selected: Not looked at: every token has a share in all experts.
      num_tasks: Number of tasks, each with slots of its own, or None.
      capacity_factor: Slots of all experts over tokens: each expert has
        ``round(capacity_factor · tokens / experts)``.
      slot_init: Initialiser of the slots' vectors, ``[width, experts, slots]``.
    """

    num_experts: int
    num_selected: int
    num_tasks: int | None = None
    capacity_factor: float = 1.0
    slot_init: GateInit = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "groups tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "groups tokens features"] | None = None,
        *,
        train: bool,
    ) -> SoftSlots:
        """Weighs the tokens of each group, in training as otherwise.

        Raises:
          ValueError: If ``capacity_factor`` is not finite or leaves experts no slot,
            or ``task`` does not fit ``num_tasks``.
        """
        del condition, train
        check_task(task, self.num_tasks)
        check_capacity_factor(self.capacity_factor, has_buffers=True)
        num_tokens, width = tokens.shape[1:]
        num_slots = round(self.capacity_factor * num_tokens / self.num_experts)
        check_num_slots(num_slots, num_tokens, self.num_experts, self.capacity_factor)
        slots = parameter(
            self,
            "slots",
            self.slot_init,
            (width, self.num_experts, num_slots),
            (*KERNEL_AXES, None),
            self.num_tasks,
        )
        scale = parameter(self, "scale", nn.initializers.ones, (), (), self.num_tasks)
        return soft(tokens, of_task(slots, task), of_task(scale, task))
