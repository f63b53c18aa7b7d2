"""Auxiliary losses: how tokens and tasks spread over experts, how large logits grow."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def switch_loss(
    probabilities: Float[Array, "*groups tokens experts"],
    expert_index: Int[Array, "*groups tokens selected"],
) -> Float[Array, "*groups"]:
    """The loss of the Switch Transformer (Fedus et al., 2022): ``E · Σ_e f_e P_e``.

    ``f_e`` is the fraction of a group's assignments that go to expert ``e``, and has no
    gradient; ``P_e`` is the mean of its gate. The loss is 1 where either is uniform,
    and ``num_experts`` where one expert has everything.

    Args:
      probabilities: Softmax of the router's logits, float32.
      expert_index: The experts of each token.

    Returns:
      One loss a group.
    """
    num_experts = probabilities.shape[-1]
    chosen = jax.nn.one_hot(expert_index, num_experts, dtype=probabilities.dtype)
    fraction = jnp.mean(chosen, axis=(-3, -2))
    gate = jnp.mean(probabilities, axis=-2)
    return num_experts * jnp.sum(fraction * gate, axis=-1)


def gshard_loss(
    probabilities: Float[Array, "*groups tokens experts"],
) -> Float[Array, "*groups"]:
    """The loss of GShard (Lepikhin et al., 2021), which counts first choices alone.

    Algorithm 1 of the paper has a mean over experts of ``f_e P_e``; its code and V-MoE
    multiply that by the square of their number, as here, so that it is `switch_loss`
    of each token's best expert.

    Args:
      probabilities: Softmax of the logits by which tokens are routed, float32.

    Returns:
      One loss a group.
    """
    return switch_loss(probabilities, jnp.argmax(probabilities, axis=-1)[..., None])


def z_loss(
    logits: Float[Array, "*groups tokens experts"],
) -> Float[Array, "*groups"]:
    """Mean square of the logarithm of the softmax's denominator (ST-MoE).

    It keeps logits small, where rounding errors of their exponentials are (Zoph et al.,
    2022, equation 5).

    Args:
      logits: The router's logits, float32.

    Returns:
      One loss a group.
    """
    denominator = jax.scipy.special.logsumexp(logits, axis=-1)
    return jnp.mean(jnp.square(denominator), axis=-1)


def mutual_information(
    gates: Float[Array, "tasks experts"],
    num_tokens: Float[Array, " tasks"] | None = None,
) -> Float[Array, ""]:
    """Negative mutual information of tasks and experts (Mod-Squad).

    Minimising it makes each task sure of its experts and keeps all experts in use
    (Chen et al., 2023): ``-Σ P log(P / (P_T P_E) + ε)``, with the joint distribution
    ``P`` of task and expert over all (token, task) pairs of a step, marginals
    ``P_T + ε`` and ``P_E + ε``, and ``ε = 10⁻⁴`` as released. It is about 0 where
    tasks use experts alike, and ``-log min(tasks, experts)`` at the least.

    Args:
      gates: Mean gate of each expert over the tokens that each task saw.
      num_tokens: Tokens that each task saw, 0 for a task that saw none; by default all
        saw equally many.

    Returns:
      The loss of one layer; it is 0 where no task saw a token.
    """
    if num_tokens is None:
        num_tokens = jnp.ones(gates.shape[0], gates.dtype)
    total = jnp.sum(num_tokens)
    share = num_tokens / jnp.where(total > 0, total, 1.0)
    joint = jnp.where(share[:, None] > 0, gates, 0.0) * share[:, None]
    epsilon = 1e-4
    by_task = jnp.sum(joint, axis=1, keepdims=True) + epsilon
    by_expert = jnp.sum(joint, axis=0, keepdims=True) + epsilon
    return -jnp.sum(joint * jnp.log(joint / (by_task * by_expert) + epsilon))
