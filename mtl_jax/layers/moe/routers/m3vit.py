"""M³ViT's routing as its released command trains it."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from mtl_jax.layers.moe.gates import Gate, MakeGate, among_visible
from mtl_jax.layers.moe.routing import Routing, at_selected, largest, weighted_sum


def m3vit(
    logits: Float[Array, "groups tokens experts"],
    *,
    num_selected: int,
    balance_weight: float = 0.01,
) -> Routing:
    """M³ViT's routing (Fan et al., NeurIPS 2022), as released.

    Selection and weights are those of `noisy_top_k` without noise, which the released
    command sets to zero. The balancing differs from V-MoE's: the importance of an
    expert is the sum of its gates over the tokens that *selected* it, the load counts
    those tokens and has no gradient, and of both the squared coefficient of variation
    has the unbiased variance and 1e-10 added to the squared mean.

    Args:
      logits: The gate's logits, float32.
      num_selected: Experts a token goes to, between 1 and the number of experts.
      balance_weight: Weight of the sum of both losses.

    Returns:
      The routing; ties go to the expert of lower index.
    """
    gates = jax.nn.softmax(logits)
    expert_index = largest(gates, num_selected)
    chosen = jax.nn.one_hot(expert_index, gates.shape[-1], dtype=gates.dtype).sum(-2)
    unweighted = {
        "importance_loss": _squared_variation(jnp.sum(gates * chosen, axis=-2)),
        "load_loss": _squared_variation(jnp.sum(chosen, axis=-2)),
    }
    return Routing(
        expert_index=expert_index,
        weight=at_selected(gates, expert_index),
        probabilities=gates,
        losses=unweighted,
        auxiliary_loss=weighted_sum(
            unweighted, dict.fromkeys(unweighted, balance_weight)
        ),
    )


def _squared_variation(
    amounts: Float[Array, "groups experts"],
) -> Float[Array, " groups"]:
    if amounts.shape[-1] == 1:
        return jnp.zeros(amounts.shape[:-1], amounts.dtype)
    variance = jnp.var(amounts, axis=-1, ddof=1)
    return variance / (jnp.square(jnp.mean(amounts, axis=-1)) + 1e-10)


def released_init(
    key: Key[Array, ""], shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "inputs experts"]:
    """Initial values of a gate's kernel in the released code.

    They are uniform up to one over the square root of the number of experts: PyTorch's
    Kaiming-uniform, which takes the experts for the inputs.

    Args:
      key: Random key.
      shape: Numbers of inputs and of experts.
      dtype: Dtype of the values.

    Returns:
      The values.
    """
    scaling = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
    return scaling(key, shape, dtype)


class M3ViT(nn.Module):
    """The router of M³ViT's released code; see `m3vit`.

    The paper's description, noise included, is `NoisyTopK` with ``num_tasks`` or a
    `TaskConditionedGate`.

    Attributes:
      num_experts: Number of experts.
      num_selected: Experts a token goes to.
      num_tasks: Number of tasks the gate tells apart, or None.
      gate: Makes the gate. There is no noise that would tell equal logits apart, so
        zeros are no initial value for it; the released ones are `released_init`.
      balance_weight: Weight of the balancing losses.
    """

    num_experts: int
    num_selected: int
    num_tasks: int | None = None
    gate: MakeGate = functools.partial(Gate, kernel_init=released_init)
    balance_weight: float = 0.01

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "groups tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "groups tokens features"] | None = None,
        *,
        train: bool,
    ) -> Routing:
        """Routes the tokens of each group, in training as otherwise."""
        del train
        gate = self.gate(
            num_experts=self.num_experts, num_tasks=self.num_tasks, name="gate"
        )
        logits = gate(tokens, task, condition)
        decide = functools.partial(
            m3vit,
            num_selected=self.num_selected,
            balance_weight=self.balance_weight,
        )
        return among_visible(gate, logits, task, decide)
