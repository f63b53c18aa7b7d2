"""MGDA: the shortest vector in the convex hull of the task gradients."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows
from mtl_jax.optim.nonnegative import nonnegative_minimizer


def weights(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Convex weights of the min-norm point, `argmin wᵀ G w` over the simplex.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the Gramian's dtype, nonnegative, summing to 1 (to 0 where no task is
        active).
    """
    cosines, norms, active = unit_rows(gramian, active)
    zero = active & (norms == 0)
    present = active & ~zero
    # With v = w * norms the simplex is aᵀv = 1, a = 1/norms, and adding (aᵀv)² to the
    # objective changes nothing on it but lets the constraint go: what is left is
    # min ½ vᵀ(C + aaᵀ)v − aᵀv over v ≥ 0, up to the scale of v.
    smallest = jnp.min(jnp.where(present, norms, jnp.inf))
    inverse_norms = jnp.where(present, smallest / jnp.where(present, norms, 1), 0)
    minimize = nonnegative_minimizer(
        cosines + inverse_norms[:, None] * inverse_norms[None, :]
    )
    values = minimize(inverse_norms, present) * inverse_norms
    values = jnp.where(jnp.any(zero), zero.astype(values.dtype), values)
    total = jnp.sum(values)
    return values / jnp.where(total > 0, total, 1)


def mgda(num_tasks: int) -> Aggregator:
    """Step along the min-norm point of the convex hull of the task gradients.

    `d = sum_k w_k g_k` with `w = argmin |sum_k w_k g_k|²`, `w ≥ 0`, `sum_k w_k = 1`.
    Then `d · g_k ≥ |d|²` for every task: no task gets worse, and `d = 0` only where no
    direction improves them all. Exact: the published Frank-Wolfe iteration stops short
    of the minimum.

    A zero gradient makes `d = 0`, and so do opposite ones; duplicates share their
    weight in some way and leave `d` as it was. Small gradients dominate: `d` is never
    longer than the shortest. Cost: the Gramian, then at most about `tasks` small linear
    systems.

    Args:
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective
        optimization, Comptes Rendus Mathématique 350, 2012.
        Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization,
        NeurIPS 2018, https://arxiv.org/abs/1810.04650.
    """
    return from_weights(weights, num_tasks)
