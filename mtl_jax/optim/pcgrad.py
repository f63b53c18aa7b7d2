"""PCGrad: project each task's gradient off those it conflicts with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows


def weights(
    gramian: Float[Array, "tasks tasks"],
    orders: Int[Array, "tasks tasks"],
    active: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """Weights of the original gradients in the sum of the projected ones.

    Args:
        gramian: Inner products of the task gradients.
        orders: Row `i` is a permutation of all tasks: the order in which task `i`
            visits the others; its own index in it is skipped.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the Gramian's dtype, 0 for inactive tasks.
    """
    cosines, norms, active = unit_rows(gramian, active)
    num_tasks = cosines.shape[0]

    def project(own: Array, order: Array) -> Array:
        def visit(position: Array, row: Array) -> Array:
            other = order[position]
            # Elementwise, as a matrix product may run in reduced precision.
            overlap = jnp.sum(cosines[other] * row)
            overlap = jnp.where(other == own, 0, jnp.minimum(overlap, 0))
            return row.at[other].add(-overlap)

        start = (jnp.arange(num_tasks) == own).astype(cosines.dtype)
        return jax.lax.fori_loop(0, num_tasks, visit, start)

    # projected[i, j]: the share of unit gradient j in the projected unit gradient i.
    projected = jax.vmap(project)(jnp.arange(num_tasks), orders)
    scale = norms[:, None] / jnp.where(norms > 0, norms, 1)[None, :]
    identity = jnp.eye(num_tasks, dtype=bool)
    scale = jnp.where(identity, active[:, None].astype(scale.dtype), scale)
    return jnp.sum(projected * scale, axis=0)


def pcgrad(num_tasks: int, *, seed: int = 0) -> Aggregator:
    """Sum the task gradients after projecting out pairwise conflicts.

    Each task starts from `c = g_i` and visits the other tasks `j` in a random order,
    fresh for every task and step; where `c · g_j < 0` it subtracts the projection
    `(c · g_j / |g_j|²) g_j` on the *original* gradient `g_j`. The update is the sum of
    all `c`. With two tasks the order does not matter; with more, the result varies with
    it and may still conflict with a task.

    Zero gradients are skipped, duplicates change nothing but their count, and two
    opposite gradients cancel. Cost: the Gramian and `tasks³` scalar operations.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        seed: Seed of the random orders; the key is kept in the state.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020,
        https://arxiv.org/abs/2001.06782.
    """

    def weigh(gramian: Array, active: Array, key: PRNGKeyArray) -> Array:
        orders = jnp.argsort(jax.random.uniform(key, (num_tasks, num_tasks)), axis=-1)
        return weights(gramian, orders, active)

    return from_weights(weigh, num_tasks, seed=seed)
