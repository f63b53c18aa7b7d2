"""Routers: which experts each token goes to, as pure functions of logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtl_jax.layers.moe import losses


class Routing(NamedTuple):
    """A router's decision on every token of every routing group.

    Attributes:
      expert_index: Experts of each token, the best first.
      weight: Weights with which the experts' outputs are added; float32.
      importance_loss: Unweighted importance loss of each group.
      load_loss: Unweighted load loss of each group; 0 without noise.
      load: Fraction of a group's assignments that went to each expert.
      entropy: Mean entropy of the tokens' gates without noise, in nats.
    """

    expert_index: Int[Array, "groups tokens selected"]
    weight: Float[Array, "groups tokens selected"]
    importance_loss: Float[Array, " groups"]
    load_loss: Float[Array, " groups"]
    load: Float[Array, "groups experts"]
    entropy: Float[Array, " groups"]


def largest(
    values: Float[Array, "*rows experts"], count: int
) -> Int[Array, "*rows selected"]:
    """Indices of the ``count`` largest values, the largest first.

    As ``jax.lax.top_k``, for which the partitioner would gather all rows on every
    device. The values must be finite.
    """
    indices = []
    for _ in range(count):
        index = jnp.argmax(values, axis=-1)
        indices.append(index)
        taken = jax.nn.one_hot(index, values.shape[-1], dtype=jnp.bool_)
        values = jnp.where(taken, -jnp.inf, values)
    return jnp.stack(indices, axis=-1)


def route(
    logits: Float[Array, "groups tokens experts"],
    noise: Float[Array, "groups tokens experts"] | None,
    *,
    num_selected: int,
    noise_std: float = 1.0,
) -> Routing:
    """Noisy top-k routing (V-MoE, Riquelme et al., 2021).

    Each token goes to the ``num_selected`` experts of largest noisy logit. The weights
    are the softmax over *all* experts of the noisy logits, not renormalised over the
    selected ones, so that the router learns even with one selected expert.

    Args:
      logits: The router's logits, float32.
      noise: Standard normal noise, scaled here by ``noise_std / num_experts``; None
        routes deterministically, and then the load loss is 0.
      num_selected: Experts a token goes to, between 1 and the number of experts.
      noise_std: Standard deviation of the noise times the number of experts.

    Returns:
      The routing; ties go to the expert of lower index.
    """
    num_experts = logits.shape[-1]
    noise_scale = noise_std / num_experts
    noisy = logits if noise is None else logits + noise_scale * noise
    expert_index = largest(noisy, num_selected)
    selected = jax.nn.one_hot(expert_index, num_experts, dtype=logits.dtype)
    # Products with one-hot rows rather than gathers: their transposes would scatter.
    probabilities = jax.nn.softmax(noisy)
    weight = jnp.sum(selected * probabilities[..., None, :], axis=-1)
    clean = jax.nn.softmax(logits)
    if noise is None:
        load_loss = jnp.zeros(logits.shape[:1], logits.dtype)
    else:
        threshold = jnp.sum(selected[..., -1, :] * noisy, axis=-1)
        load_loss = losses.load_loss(logits, threshold, noise_scale)
    log_clean = jax.nn.log_softmax(logits)
    return Routing(
        expert_index=expert_index,
        weight=weight,
        importance_loss=losses.importance_loss(clean),
        load_loss=load_loss,
        load=jnp.mean(selected, axis=(1, 2)),
        entropy=jnp.mean(-jnp.sum(clean * log_clean, axis=-1), axis=-1),
    )
