"""Noisy top-k routing with importance and load losses, and batch priority."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mtl_jax.layers.moe import losses
from mtl_jax.layers.moe.gates import Gate, MakeGate, among_visible
from mtl_jax.layers.moe.routing import Routing, at_selected, largest, weighted_sum


def noisy_top_k(
    logits: Float[Array, "groups tokens experts"],
    noise: Float[Array, "groups tokens experts"] | None,
    *,
    num_selected: int,
    noise_std: float = 1.0,
    importance_weight: float = 0.005,
    load_weight: float = 0.005,
    gshard_weight: float = 0.0,
    z_weight: float = 0.0,
    batch_priority: bool = False,
) -> Routing:
    """Noisy top-k routing (V-MoE, Riquelme et al., 2021).

    Each token goes to the ``num_selected`` experts of largest noisy logit. The weights
    are the softmax over *all* experts of the noisy logits, not renormalised over the
    selected ones, so that the router learns even with one selected expert.

    Args:
      logits: The gate's logits, float32.
      noise: Standard normal noise, scaled here by ``noise_std / num_experts``; None
        routes deterministically, and then there is no load loss.
      num_selected: Experts a token goes to, between 1 and the number of experts.
      noise_std: Standard deviation of the noise times the number of experts.
      importance_weight: Weight of the importance loss.
      load_weight: Weight of the load loss.
      gshard_weight: Weight of `mtl_jax.layers.moe.losses.gshard_loss` of the noisy
        gates, which is taken only where this is not 0.
      z_weight: Weight of `mtl_jax.layers.moe.losses.z_loss` of the logits without
        noise, which is taken only where this is not 0.
      batch_priority: Whether tokens of larger first weight take the slots first
        (batch-priority routing); otherwise the order of the tokens decides.

    Returns:
      The routing; ties go to the expert of lower index.
    """
    noise_scale = noise_std / logits.shape[-1]
    noisy = logits if noise is None else logits + noise_scale * noise
    expert_index = largest(noisy, num_selected)
    gates = jax.nn.softmax(noisy)
    weight = at_selected(gates, expert_index)
    clean = jax.nn.softmax(logits)
    unweighted = {"importance_loss": losses.importance_loss(clean)}
    if noise is None:
        unweighted["load_loss"] = jnp.zeros(logits.shape[:1], logits.dtype)
    else:
        threshold = at_selected(noisy, expert_index)[..., -1]
        unweighted["load_loss"] = losses.load_loss(logits, threshold, noise_scale)
    if gshard_weight:
        unweighted["gshard_loss"] = losses.gshard_loss(gates)
    if z_weight:
        unweighted["z_loss"] = losses.z_loss(logits)
    weights = {
        "importance_loss": importance_weight,
        "load_loss": load_weight,
        "gshard_loss": gshard_weight,
        "z_loss": z_weight,
    }
    return Routing(
        expert_index=expert_index,
        weight=weight,
        probabilities=clean,
        losses=unweighted,
        auxiliary_loss=weighted_sum(unweighted, weights),
        priority=weight[..., 0] if batch_priority else None,
    )


class NoisyTopK(nn.Module):
    """The router of V-MoE; see `noisy_top_k`.

    In training the noise takes the ``router`` key.

    Attributes:
      num_experts: Number of experts.
      num_selected: Experts a token goes to.
      num_tasks: Number of tasks the gate tells apart, or None.
      gate: Makes the gate.
      noise_std: Standard deviation of the noise on the logits in training, times the
        number of experts.
      importance_weight: Weight of the importance loss.
      load_weight: Weight of the load loss.
      gshard_weight: Weight of GShard's loss.
      z_weight: Weight of the loss on large logits.
      batch_priority: Whether the most confident tokens take the slots first.
    """

    num_experts: int
    num_selected: int
    num_tasks: int | None = None
    gate: MakeGate = Gate
    noise_std: float = 1.0
    importance_weight: float = 0.005
    load_weight: float = 0.005
    gshard_weight: float = 0.0
    z_weight: float = 0.0
    batch_priority: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "groups tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "groups tokens features"] | None = None,
        *,
        train: bool,
    ) -> Routing:
        """Routes the tokens of each group."""
        gate = self.gate(
            num_experts=self.num_experts, num_tasks=self.num_tasks, name="gate"
        )
        logits = gate(tokens, task, condition)
        noisy = train and self.noise_std > 0
        key = self.make_rng("router") if noisy else None

        def decide(logits: Float[Array, "groups tokens visible"]) -> Routing:
            return noisy_top_k(
                logits,
                None if key is None else jax.random.normal(key, logits.shape),
                num_selected=self.num_selected,
                noise_std=self.noise_std,
                importance_weight=self.importance_weight,
                load_weight=self.load_weight,
                gshard_weight=self.gshard_weight,
                z_weight=self.z_weight,
                batch_priority=self.batch_priority,
            )

        return among_visible(gate, logits, task, decide)
