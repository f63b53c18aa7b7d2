"""What a router decides, where each token chooses its experts."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Routing(NamedTuple):
    """Experts chosen by each token of every routing group.

    Attributes:
      expert_index: Experts of each token, the best first.
      weight: Weights with which the experts' outputs are added; float32.
      probabilities: Gate of every expert for each token, without noise; float32, and
        what statistics are taken of.
      losses: Name -> unweighted auxiliary loss of each group.
      auxiliary_loss: Weighted sum of the losses, averaged over groups.
      priority: Tokens of higher priority take the experts' slots first; None where the
        order of the tokens decides.
      num_visible: How many experts the tokens could choose from, which are the first
        ones; None for all.
    """

    expert_index: Int[Array, "groups tokens selected"]
    weight: Float[Array, "groups tokens selected"]
    probabilities: Float[Array, "groups tokens experts"]
    losses: Mapping[str, Float[Array, " groups"]]
    auxiliary_loss: Float[Array, ""]
    priority: Float[Array, "groups tokens"] | None = None
    num_visible: Int[Array, ""] | None = None


def largest(
    values: Float[Array, "*rows experts"], count: int
) -> Int[Array, "*rows selected"]:
    """Indices of the ``count`` largest values, the largest first.

    As ``jax.lax.top_k``, for which the partitioner would gather all rows on every
    device. No index comes twice; ties go to the lower one.
    """
    # What is taken must be below all others, also where those are infinitely low.
    values = jnp.maximum(values, jnp.finfo(values.dtype).min)
    indices = []
    for _ in range(count):
        index = jnp.argmax(values, axis=-1)
        indices.append(index)
        taken = jax.nn.one_hot(index, values.shape[-1], dtype=jnp.bool_)
        values = jnp.where(taken, -jnp.inf, values)
    return jnp.stack(indices, axis=-1)


def at_selected(
    values: Float[Array, "*rows experts"], expert_index: Int[Array, "*rows selected"]
) -> Float[Array, "*rows selected"]:
    """The selected experts' values.

    Products with one-hot rows rather than gathers, whose transposes would scatter.
    """
    selected = jax.nn.one_hot(expert_index, values.shape[-1], dtype=values.dtype)
    return jnp.sum(selected * values[..., None, :], axis=-1)


def assigned_fraction(
    expert_index: Int[Array, "groups tokens selected"], num_experts: int
) -> Float[Array, "groups experts"]:
    """Fraction of each group's assignments that went to each expert."""
    selected = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32)
    return jnp.mean(selected, axis=(1, 2))


def weighted_sum(
    losses: Mapping[str, Float[Array, " groups"]], weights: Mapping[str, float]
) -> Float[Array, ""]:
    """Losses averaged over groups, times their weights, added up."""
    return sum(
        (weights[name] * jnp.mean(loss) for name, loss in losses.items()),
        start=jnp.zeros((), jnp.float32),
    )


def entropy(
    probabilities: Float[Array, "groups tokens experts"],
) -> Float[Array, ""]:
    """Mean entropy of the tokens' gates, in nats, after normalising each to sum 1."""
    total = jnp.sum(probabilities, axis=-1, keepdims=True)
    shares = probabilities / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return jnp.mean(jnp.sum(jax.scipy.special.entr(shares), axis=-1))
