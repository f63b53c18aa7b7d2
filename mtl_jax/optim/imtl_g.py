"""IMTL-G: a step with the same projection on every task gradient."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows
from mtl_jax.optim.spectrum import equal_angles


def weights(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Weights of sum 1 whose direction projects equally on all unit task gradients.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the Gramian's dtype, of any sign, 0 for inactive tasks and zero
        gradients, and 0 for all where no direction has equal projections.
    """
    cosines, norms, _ = unit_rows(gramian, active)
    present = norms > 0
    smallest = jnp.min(jnp.where(present, norms, jnp.inf))
    inverse = jnp.where(present, smallest / jnp.where(present, norms, 1), 0)
    values = equal_angles(cosines, present) * inverse
    total = jnp.sum(values)
    return values / jnp.where(total == 0, 1, total)


def imtl_g(num_tasks: int) -> Aggregator:
    """Step so that every task gradient gets the same share of the step.

    `d = sum_k w_k g_k` with `sum_k w_k = 1` and `d · g_k / |g_k|` the same for every
    task. Solved on unit gradients, `w_k |g_k| ∝ (C⁺ 1)_k` with `C` their cosines, so
    that the ratio of their norms costs no digits. Weights may be negative, and where
    many are, the sum that they are divided by may be too: then `d` goes against every
    task, as the method is published.

    A zero gradient is left out; duplicates share their weight; opposite gradients, of
    whatever norms, have no direction of equal positive projections, and give 0. Cost:
    the Gramian and the eigenvalues of a `tasks x tasks` matrix.

    Args:
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Liu et al., Towards Impartial Multi-task Learning, ICLR 2021,
        https://openreview.net/forum?id=IMPnRXEWpvr.
    """
    return from_weights(weights, num_tasks)
