"""Auxiliary losses that spread tokens over experts."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_variation(
    amounts: Float[Array, "*groups experts"],
) -> Float[Array, "*groups"]:
    """Squared coefficient of variation over experts: population variance / mean²."""
    mean = jnp.mean(amounts, axis=-1)
    variance = jnp.var(amounts, axis=-1)
    # An expert layer whose gates all underflow has nothing to balance.
    safe_mean = jnp.where(mean > 0, mean, 1.0)
    return jnp.where(mean > 0, variance / jnp.square(safe_mean), 0.0)


def importance_loss(
    probabilities: Float[Array, "*groups tokens experts"],
) -> Float[Array, "*groups"]:
    """Squared variation of the experts' importance (Shazeer et al., 2017).

    An expert's importance is the sum of its gate probabilities over the tokens of a
    group. The loss is 0 for a uniform router and ``num_experts - 1`` where one expert
    has all the probability.

    Args:
      probabilities: Softmax of the router's logits without noise, float32.

    Returns:
      One loss a group, as in V-MoE (Riquelme et al., 2021).
    """
    return squared_variation(jnp.sum(probabilities, axis=-2))


def load_loss(
    logits: Float[Array, "*groups tokens experts"],
    threshold: Float[Array, "*groups tokens"],
    noise_scale: float,
) -> Float[Array, "*groups"]:
    """Squared variation of the experts' expected load (Shazeer et al., 2017).

    A token's chance to reach an expert, were its noise drawn anew, is the chance that
    the expert's noisy logit exceeds the least one that was selected:
    ``1 - Φ((threshold - logit) / noise_scale)``. The counts themselves have no
    gradient.

    Args:
      logits: The router's logits without noise, float32.
      threshold: The least selected noisy logit of each token.
      noise_scale: Standard deviation of the noise, positive, in units of logits.

    Returns:
      One loss a group, as in V-MoE (Riquelme et al., 2021).
    """
    needed = (threshold[..., None] - logits) / noise_scale
    # 1 - Φ without its cancellation in the tail.
    chance = 0.5 * jax.lax.erfc(needed / math.sqrt(2))
    return squared_variation(jnp.mean(chance, axis=-2))
