"""Expert choice: each expert takes the tokens that suit it best."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.layers.moe.checks import check_capacity_factor, check_num_slots
from mtl_jax.layers.moe.gates import Gate, MakeGate
from mtl_jax.sharding import expert_parallel


class ChosenTokens(NamedTuple):
    """Tokens chosen by each expert; a `mtl_jax.layers.moe.dispatcher.Dispatcher`.

    Attributes:
      token_index: Tokens of each expert's buffer, the best first.
      weight: Weights with which the outputs are added to the tokens; float32.
      probabilities: Gate of every expert for each token, without noise; float32.
      processed: Which tokens some expert took, with a weight that is not zero.
    """

    token_index: Int[Array, "groups experts capacity"]
    weight: Float[Array, "groups experts capacity"]
    probabilities: Float[Array, "groups tokens experts"]
    processed: Bool[Array, "groups tokens"]

    def dispatch(
        self, tokens: Float[Array, "groups tokens width"]
    ) -> Float[Array, "experts groups capacity width"]:
        """Copies tokens into the buffers."""
        return jax.vmap(lambda rows, index: rows[index], out_axes=1)(
            tokens, self.token_index
        )

    def combine(
        self, buffers: Float[Array, "experts groups capacity width"]
    ) -> Float[Array, "groups tokens width"]:
        """Adds up each token's outputs by weight; those nobody took get zeros."""

        def one(rows, index, weight):
            weighted = rows * weight[..., None].astype(rows.dtype)
            sums = jnp.zeros((self.processed.shape[1], rows.shape[-1]), rows.dtype)
            return sums.at[index].add(weighted)

        return jax.vmap(one, in_axes=(1, 0, 0))(buffers, self.token_index, self.weight)


def expert_choice(
    logits: Float[Array, "groups tokens experts"],
    noise: Float[Array, "groups tokens experts"] | None,
    *,
    capacity: int,
    noise_std: float = 1.0,
) -> ChosenTokens:
    """Expert choice (Zhou et al., NeurIPS 2022).

    Each expert takes the ``capacity`` tokens of the group whose softmax over *experts*
    is largest for it, with that softmax as weight. All experts have the same load and
    there is no auxiliary loss; a token may have none of them or all. Tokens compete
    with the others of their group, so that a prediction depends on these.

    Args:
      logits: The gate's logits, float32.
      noise: Standard normal noise, scaled here by ``noise_std / num_experts``, or None.
      capacity: Tokens that each expert takes of each group, at most all.
      noise_std: Standard deviation of the noise times the number of experts.

    Returns:
      The choice; ties go to the token that comes first.
    """
    clean = gates = jax.nn.softmax(logits)
    if noise is not None:
        gates = jax.nn.softmax(logits + noise_std / logits.shape[-1] * noise)

    def choose(gates):
        weight, index = jax.lax.top_k(gates.swapaxes(1, 2), capacity)
        # An expert that the task does not see takes tokens too, for nothing.
        processed = jax.vmap(lambda row, index, taken: row.at[index].max(taken))(
            jnp.zeros(gates.shape[:2], jnp.bool_), index, weight > 0
        )
        return index, weight, processed

    # The partitioner would gather the gates of all groups to sort them.
    index, weight, processed = expert_parallel.map_groups(
        choose, in_axes=(0,), out_axes=(0, 0, 0)
    )(gates)
    return ChosenTokens(index, weight, clean, processed)


class ExpertChoice(nn.Module):
    """The router of Zhou et al.; see `expert_choice`.

    In training the noise takes the ``router`` key.

    Attributes:
      num_experts: Number of experts.
      num_selected: Not looked at: how many experts a token has is for them to say.
      num_tasks: Number of tasks the gate tells apart, or None.
      gate: Makes the gate. With equal logits all experts would take the same tokens,
        so zeros are no initial value for it.
      capacity_factor: Experts that a token has on average: each expert takes
        ``ceil(capacity_factor · tokens / experts)`` tokens of a group.
      noise_std: Standard deviation of the noise on the logits in training, times the
        number of experts; none in the paper, 1 in V-MoE's code.
    """

    num_experts: int
    num_selected: int
    num_tasks: int | None = None
    gate: MakeGate = functools.partial(Gate, kernel_init=nn.initializers.lecun_normal())
    capacity_factor: float = 2.0
    noise_std: float = 0.0

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "groups tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "groups tokens features"] | None = None,
        *,
        train: bool,
    ) -> ChosenTokens:
        """Lets experts choose from the tokens of each group.

        Raises:
          ValueError: If ``capacity_factor`` is not finite or leaves experts no token.
        """
        check_capacity_factor(self.capacity_factor, has_buffers=True)
        num_tokens = tokens.shape[1]
        capacity = math.ceil(self.capacity_factor * num_tokens / self.num_experts)
        check_num_slots(capacity, num_tokens, self.num_experts, self.capacity_factor)
        logits = self.gate(
            num_experts=self.num_experts, num_tasks=self.num_tasks, name="gate"
        )(tokens, task, condition)
        noise = None
        if train and self.noise_std > 0:
            noise = jax.random.normal(self.make_rng("router"), logits.shape)
        return expert_choice(
            logits,
            noise,
            capacity=min(capacity, num_tokens),
            noise_std=self.noise_std,
        )
