"""Balancing without a loss: a bias on the choice of experts, moved by counts."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.layers.moe.gates import (
    HIDDEN,
    Gate,
    MakeGate,
    check_task,
    num_visible,
)
from mtl_jax.layers.moe.routing import Routing, at_selected, largest


def loss_free(
    logits: Float[Array, "groups tokens experts"],
    bias: Float[Array, " experts"],
    *,
    num_selected: int,
    routed_scaling: float = 1.0,
    as_released: bool = False,
) -> Routing:
    """Routing by biased scores (Wang et al., 2024; DeepSeek-V3, 2024, equation 16).

    A token's score of an expert is the sigmoid of its logit. It goes to the
    ``num_selected`` experts of largest score *plus bias*, with the scores *without*
    bias as weights, divided by their sum over the selected ones and multiplied by
    ``routed_scaling``.

    Args:
      logits: The gate's logits, float32.
      bias: Bias of each expert, which has no gradient.
      num_selected: Experts a token goes to, between 1 and the number of experts.
      routed_scaling: Sum of a token's weights; DeepSeek-V3 has 2.5, SMoRA the number of
        selected experts.
      as_released: Whether to weight by the scores with bias, as SMoRA's code does
        (Zhao et al., 2026).

    Returns:
      The routing, without losses; ties go to the expert of lower index.
    """
    scores = jax.nn.sigmoid(logits)
    biased = scores + jax.lax.stop_gradient(bias)[None, None]
    # An expert that a gate hides must not win by the negative bias of others.
    seen = scores > 0
    expert_index = largest(jnp.where(seen, biased, -1e30), num_selected)
    if as_released:
        selected = at_selected(jnp.where(seen, biased, 0.0), expert_index)
        total = jnp.sum(selected, axis=-1, keepdims=True)
        # Its square, which gradients are divided by, may underflow: a token sure of no
        # expert has weights of zero, or next to it.
        tiny = jnp.abs(total) < jnp.finfo(jnp.float32).tiny ** 0.5
        weight = selected / jnp.where(tiny, 1.0, total)
    else:
        # What sigmoids divided by their sum are, also where all of them underflow.
        selected = at_selected(logits, expert_index)
        weight = jax.nn.softmax(jax.nn.log_sigmoid(selected), axis=-1)
    return Routing(
        expert_index=expert_index,
        weight=routed_scaling * weight,
        probabilities=scores,
        losses={},
        auxiliary_loss=jnp.zeros((), jnp.float32),
    )


def updated_bias(
    bias: Float[Array, " experts"],
    expert_index: Int[Array, "groups tokens selected"],
    seen: Bool[Array, " experts"],
    update_rate: float,
) -> Float[Array, " experts"]:
    """The bias after a step: up by ``update_rate`` where an expert got too few.

    ``bias + update_rate · sign(mean count - count)``, with the assignments of all
    groups counted, on whatever devices they are.

    Args:
      bias: Bias of each expert.
      expert_index: Experts of each token.
      seen: Which experts tokens may go to. The mean is over these, and the bias of
        others stays: nobody goes there, and in the mean they would make the load of
        those that are seen look too high.
      update_rate: How far the bias moves.
    """
    chosen = jax.nn.one_hot(expert_index, bias.shape[-1], dtype=jnp.int32)
    count = jnp.sum(chosen, axis=(0, 1, 2)).astype(bias.dtype)
    direction = jnp.sign(jnp.mean(count, where=seen) - count)
    return bias + update_rate * jnp.where(seen, direction, 0.0)


class LossFree(nn.Module):
    """DeepSeek's router without auxiliary losses; see `loss_free`.

    The bias is ``bias [experts]``, or ``[tasks, experts]``, of collection ``balance``.
    It moves in training wherever the caller makes that collection mutable, and must be
    kept with the parameters.

    Attributes:
      num_experts: Number of experts.
      num_selected: Experts a token goes to, at least 2: the weight of a single one
        would be constant, and the gate learn nothing.
      num_tasks: Number of tasks, each with a gate and a bias of its own, or None.
      gate: Makes the gate. There is no noise that would tell equal logits apart, so
        zeros are no initial value for it; the deviation of 0.006 is DeepSeek-V3's.
      routed_scaling: Sum of a token's weights.
      update_rate: How far the bias moves at each forward pass in training, by the
        counts of that pass alone; SMoRA has 1e-5. A training step adds up what its
        passes, one for each source that uses the bias, change.
      as_released: Whether the bias enters the weights too, as in SMoRA's code.
    """

    num_experts: int
    num_selected: int
    num_tasks: int | None = None
    gate: MakeGate = functools.partial(Gate, kernel_init=nn.initializers.normal(0.006))
    routed_scaling: float = 1.0
    update_rate: float = 1e-3
    as_released: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "groups tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "groups tokens features"] | None = None,
        *,
        train: bool,
    ) -> Routing:
        """Routes the tokens of each group.

        Raises:
          ValueError: If ``num_selected`` is 1, if ``task`` does not fit ``num_tasks``,
            or if collection ``balance`` was left out.
        """
        if self.num_selected == 1:
            raise ValueError(
                "num_selected=1: weights that are renormalised are always 1 for one "
                "expert, and the gate would not learn; select 2 or more, or choose "
                "Switch."
            )
        check_task(task, self.num_tasks)
        gate = self.gate(
            num_experts=self.num_experts, num_tasks=self.num_tasks, name="gate"
        )
        logits = gate(tokens, task, condition)
        shape = (self.num_experts,)
        if self.num_tasks is not None:
            shape = (self.num_tasks, *shape)
        is_mutable = self.is_mutable_collection("balance")
        if not is_mutable and not self.has_variable("balance", "bias"):
            raise ValueError(
                "collection 'balance' is not among the variables, and has the bias of "
                "LossFree; give it to apply beside 'params', as init returned it."
            )
        biases = self.variable("balance", "bias", jnp.zeros, shape, jnp.float32)
        row = () if task is None else task
        bias = biases.value[row]
        routing = loss_free(
            logits,
            bias,
            num_selected=self.num_selected,
            routed_scaling=self.routed_scaling,
            as_released=self.as_released,
        )
        if train and is_mutable and not self.is_initializing():
            seen = jnp.any(logits > HIDDEN, axis=(0, 1))
            new = updated_bias(bias, routing.expert_index, seen, self.update_rate)
            biases.value = biases.value.at[row].set(new)
        return routing._replace(num_visible=num_visible(gate, task))
