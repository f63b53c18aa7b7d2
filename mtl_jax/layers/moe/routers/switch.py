"""Switch routing: one expert a token, with a loss on load times gate."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mtl_jax.layers.moe import losses
from mtl_jax.layers.moe.gates import Gate, MakeGate, among_visible
from mtl_jax.layers.moe.routing import Routing, at_selected, largest, weighted_sum


def switch(
    logits: Float[Array, "groups tokens experts"],
    *,
    balance_weight: float = 1e-2,
    z_weight: float = 0.0,
) -> Routing:
    """Switch routing (Fedus et al., "Switch Transformers", 2022).

    Each token goes to the expert of largest logit alone. The weight is its softmax over
    all experts, through which the router learns.

    Args:
      logits: The gate's logits, float32.
      balance_weight: Weight of `mtl_jax.layers.moe.losses.switch_loss`.
      z_weight: Weight of `mtl_jax.layers.moe.losses.z_loss`; ST-MoE has 1e-3.

    Returns:
      The routing; ties go to the expert of lower index.
    """
    probabilities = jax.nn.softmax(logits)
    expert_index = largest(logits, 1)
    unweighted = {
        "switch_loss": losses.switch_loss(probabilities, expert_index),
        "z_loss": losses.z_loss(logits),
    }
    weights = {"switch_loss": balance_weight, "z_loss": z_weight}
    return Routing(
        expert_index=expert_index,
        weight=at_selected(probabilities, expert_index),
        probabilities=probabilities,
        losses=unweighted,
        auxiliary_loss=weighted_sum(unweighted, weights),
    )


class Switch(nn.Module):
    """The router of the Switch Transformer; see `switch`.

    In training the jitter takes the ``router`` key.

    Attributes:
      num_experts: Number of experts.
      num_selected: Experts a token goes to, which must be 1.
      num_tasks: Number of tasks the gate tells apart, or None.
      gate: Makes the gate. There is no noise that would tell equal logits apart, so
        zeros are no initial value for it; the paper's is this one.
      jitter: In training the gate sees tokens times a number from
        ``[1 - jitter, 1 + jitter]``, drawn anew for each feature.
      balance_weight: Weight of the loss on load times gate.
      z_weight: Weight of the loss on large logits.
    """

    num_experts: int
    num_selected: int
    num_tasks: int | None = None
    gate: MakeGate = functools.partial(
        Gate,
        kernel_init=nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal"),
    )
    jitter: float = 1e-2
    balance_weight: float = 1e-2
    z_weight: float = 0.0

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
          ValueError: If ``num_selected`` is not 1.
        """
        if self.num_selected != 1:
            raise ValueError(
                f"num_selected={self.num_selected}, but Switch sends each token to one "
                "expert; set num_selected=1, or choose another router."
            )
        if train and self.jitter > 0:
            tokens = tokens.astype(jnp.float32) * jax.random.uniform(
                self.make_rng("router"),
                tokens.shape,
                minval=1 - self.jitter,
                maxval=1 + self.jitter,
            )
        gate = self.gate(
            num_experts=self.num_experts, num_tasks=self.num_tasks, name="gate"
        )
        logits = gate(tokens, task, condition)
        decide = functools.partial(
            switch, balance_weight=self.balance_weight, z_weight=self.z_weight
        )
        return among_visible(gate, logits, task, decide)
