"""Mod-Squad's routing, whose loss looks at all tasks of a step together."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mtl_jax.layers.moe.gates import Gate, MakeGate, among_visible
from mtl_jax.layers.moe.routing import Routing, at_selected, largest


def mod_squad(
    logits: Float[Array, "groups tokens experts"], *, num_selected: int
) -> Routing:
    """Mod-Squad's routing (Chen et al., CVPR 2023), as released.

    A token's gates are the softmax plus 1e-4; it goes to its ``num_selected`` experts
    of largest gate, with the gates as weights, not renormalised. There is no noise.

    The loss of the paper, `mtl_jax.layers.moe.losses.mutual_information`, needs the
    mean gates under every task of a step, and a router sees one task: a layer's mean
    gates are statistic ``gates``, of which the training step takes the loss.

    Args:
      logits: The gate's logits, float32.
      num_selected: Experts a token goes to, between 1 and the number of experts.

    Returns:
      The routing, without losses; ties go to the expert of lower index.
    """
    gates = jax.nn.softmax(logits) + 1e-4
    expert_index = largest(gates, num_selected)
    return Routing(
        expert_index=expert_index,
        weight=at_selected(gates, expert_index),
        probabilities=gates,
        losses={},
        auxiliary_loss=jnp.zeros((), jnp.float32),
    )


class ModSquad(nn.Module):
    """The router of Mod-Squad, one gate a task over shared experts; see `mod_squad`.

    The released gates start at zero: until they have learnt, all tokens go to the
    experts of lowest index, so that a limit on capacity would drop most of them.

    Attributes:
      num_experts: Number of experts.
      num_selected: Experts a token goes to.
      num_tasks: Number of tasks, or None for a single gate.
      gate: Makes the gate.
    """

    num_experts: int
    num_selected: int
    num_tasks: int | None = None
    gate: MakeGate = Gate

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
        decide = functools.partial(mod_squad, num_selected=self.num_selected)
        return among_visible(gate, logits, task, decide)
