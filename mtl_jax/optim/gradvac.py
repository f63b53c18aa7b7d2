"""GradVac: bring each pair of task gradients to the similarity they usually have."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows


def weights(
    gramian: Float[Array, "tasks tasks"],
    orders: Int[Array, "tasks tasks"],
    targets: Float[Array, "tasks tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    beta: float = 0.5,
) -> tuple[Float[Array, " tasks"], Float[Array, "tasks tasks"]]:
    """Weights of the original gradients in the sum of the corrected ones.

    Args:
        gramian: Inner products of the task gradients.
        orders: Row `i` is a permutation of all tasks: the order in which task `i`
            visits the others; its own index in it is skipped.
        targets: Row `i` holds the cosines that task `i` is to have with the others, in
            [-1, 1]; zeros at first.
        active: Which tasks are present; all by default.
        beta: How far the targets move towards the cosines met.

    Returns:
        `(weights, targets)` of the Gramian's dtype: weights, 0 for inactive tasks; and
        the targets of the next step, unchanged for pairs with an inactive task.
    """
    cosines, norms, active = unit_rows(gramian, active)
    num_tasks = cosines.shape[0]
    epsilon = jnp.finfo(cosines.dtype).eps

    # In units of the other's length, reaching the target `t` takes
    # t / sqrt(1 − t²) * (own part at right angles to the other) − (own part along it).
    tangents = targets / jnp.sqrt(jnp.maximum(1 - targets**2, epsilon))

    def correct(own: Array, order: Array) -> tuple[Array, Array]:
        def visit(position: Array, carry: tuple) -> tuple:
            # The shares of the unit gradients in this row, its inner products with
            # them, and the cosines it met so far.
            shares, overlaps, met = carry
            other = order[position]
            overlap = overlaps[other]
            # Elementwise, as a matrix product may run in reduced precision.
            square = jnp.sum(shares * overlaps)
            length = jnp.sqrt(jnp.maximum(square, 0))
            # A row that cancels is left with rounding noise that has no direction.
            noise = num_tasks * epsilon * jnp.sum(jnp.abs(shares)) ** 2
            cosine = overlap / jnp.where(square > noise, length, jnp.inf)

            met_both = (other != own) & (norms[own] > 0) & (norms[other] > 0)
            below = overlap < targets[own, other] * length
            aside = jnp.sqrt(jnp.maximum(square - overlap**2, 0))
            step = tangents[own, other] * aside - overlap
            step = jnp.where(met_both & below, step, 0)
            return (
                shares.at[other].add(step),
                overlaps + step * cosines[other],
                met.at[other].set(jnp.where(met_both, jnp.clip(cosine, -1, 1), 0)),
            )

        start = (jnp.arange(num_tasks) == own).astype(cosines.dtype)
        shares, _, met = jax.lax.fori_loop(
            0, num_tasks, visit, (start, cosines[own], jnp.zeros_like(start))
        )
        return shares, met

    # shares[i, j]: the share of unit gradient j in the corrected unit gradient i.
    shares, met = jax.vmap(correct)(jnp.arange(num_tasks), orders)
    scale = norms[:, None] / jnp.where(norms > 0, norms, 1)[None, :]
    identity = jnp.eye(num_tasks, dtype=bool)
    scale = jnp.where(identity, active[:, None].astype(scale.dtype), scale)

    pairs = active[:, None] & active[None, :] & ~identity
    targets = jnp.where(pairs, (1 - beta) * targets + beta * met, targets)
    return jnp.sum(shares * scale, axis=0), targets


def gradvac(num_tasks: int, *, beta: float = 0.5, seed: int = 0) -> Aggregator:
    """Sum the task gradients after bringing each pair to its usual similarity.

    Each task starts from `c = g_i` and visits the other tasks `j` in a random order,
    fresh for every task and step. With `φ = cos(c, g_j)` and the target `t = t_ij`,
    where `φ < t` it adds the multiple of the *original* gradient `g_j` after which the
    cosine is `t`,

        c ← c + |c| (t sqrt(1 − φ²) − φ sqrt(1 − t²)) / (|g_j| sqrt(1 − t²)) g_j,

    and in any case `t_ij ← (1 − beta) t_ij + beta φ`, with `φ` from before the
    correction. The update is the sum of all `c`. Targets start at zero, so that the
    first step is PCGrad's; later, tasks that usually agree are held to it, and tasks
    that usually conflict are left to conflict that much.

    Scaling all gradients alike scales the result. Zero gradients are skipped and draw
    their targets towards zero. Two opposite gradients cancel in every step. Duplicates
    change nothing but their count and draw their targets towards 1, near which a
    correction can be much longer than the gradients: tasks that have always agreed and
    fall out at last are pulled together hard. An inactive task keeps its targets. Cost:
    the Gramian and `tasks³` scalar operations; the state keeps `tasks²` numbers. The
    authors work layer by layer; so does this within `grouped`.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        beta: How far the targets move towards the cosines met, in [0, 1]. With 0 the
            method stays PCGrad. The authors average over about a hundred steps, 0.01.
        seed: Seed of the random orders; the key is kept in the state.

    Returns:
        An aggregator; see `from_weights`. Its state's memory holds the targets,
        `[tasks, tasks]`.

    Raises:
        ValueError: If `num_tasks < 1` or `beta` is not in [0, 1].

    References:
        Wang et al., Gradient Vaccine: Investigating and Improving Multi-task
        Optimization in Massively Multilingual Models, ICLR 2021,
        https://arxiv.org/abs/2010.05874.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; pass a number from 0 to 1.")

    def memory(dtype: jnp.dtype) -> Array:
        return jnp.zeros((num_tasks, num_tasks), dtype)

    def weigh(
        gramian: Array, active: Array, key: PRNGKeyArray, memory: Array
    ) -> tuple[Array, Array]:
        orders = jnp.argsort(jax.random.uniform(key, (num_tasks, num_tasks)), axis=-1)
        return weights(gramian, orders, memory, active, beta=beta)

    return from_weights(weigh, num_tasks, seed=seed, memory=memory)
