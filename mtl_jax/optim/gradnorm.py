"""GradNorm: learn weights that make weighted gradients equally long."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, all_active, from_weights


class GradNormMemory(NamedTuple):
    """What GradNorm carries from step to step.

    Attributes:
        multipliers: The weights of the next step, which sum to `tasks` over all tasks.
        initial_losses: Each task's loss in the first step in which it was active.
        seen: Which tasks have been active, and so have an initial loss.
    """

    multipliers: Float[Array, " tasks"]
    initial_losses: Float[Array, " tasks"]
    seen: Bool[Array, " tasks"]


def weights(
    gramian: Float[Array, "tasks tasks"],
    losses: Float[Array, " tasks"],
    memory: GradNormMemory,
    active: Bool[Array, " tasks"] | None = None,
    *,
    alpha: float = 1.5,
    learning_rate: float = 0.025,
) -> tuple[Float[Array, " tasks"], GradNormMemory]:
    """The weights of this step, and one step of learning those of the next.

    Args:
        gramian: Inner products of the task gradients, of which the diagonal counts.
        losses: Losses of the tasks, nonnegative.
        memory: What earlier steps have learned: multipliers 1, nothing seen at first.
        active: Which tasks are present; all by default.
        alpha: How much longer the gradients of slow tasks are to be.
        learning_rate: Size of the step.

    Returns:
        `(weights, memory)`: weights of the Gramian's dtype, positive, that sum to the
        number of active tasks, 0 for the others; and the memory of the next step, in
        which the active tasks' multipliers have the same sum as before.
    """
    active = all_active(len(losses)) if active is None else active
    count = jnp.maximum(jnp.sum(active), 1).astype(gramian.dtype)

    def mean(values: Array) -> Array:
        return jnp.sum(jnp.where(active, values, 0)) / count

    level = mean(memory.multipliers)
    values = memory.multipliers / jnp.where(level > 0, level, 1)
    values = jnp.where(active, values, 0)

    losses = jnp.clip(losses, 0, jnp.finfo(losses.dtype).max)
    starts = active & ~memory.seen
    initial_losses = jnp.where(starts, losses, memory.initial_losses)
    # How much of its first loss a task still has, relative to the others.
    known = initial_losses > 0
    remaining = jnp.where(known, losses / jnp.where(known, initial_losses, 1), 1)
    remaining = jnp.minimum(remaining, jnp.finfo(losses.dtype).max / count)
    mean_remaining = mean(remaining)
    slowness = remaining / jnp.where(mean_remaining > 0, mean_remaining, 1)
    slowness = jnp.where(mean_remaining > 0, slowness, 1)

    lengths = values * jnp.sqrt(jnp.diagonal(gramian))
    too_long = jnp.sign(lengths - mean(lengths) * slowness**alpha)
    # No weight makes a zero gradient longer.
    slope = jnp.where(lengths > 0, too_long, 0)
    moved = memory.multipliers * jnp.exp(-learning_rate * slope)
    moved_level = mean(moved)
    moved = moved * level / jnp.where(moved_level > 0, moved_level, 1)
    return values, GradNormMemory(
        multipliers=jnp.where(active, moved, memory.multipliers),
        initial_losses=initial_losses,
        seen=memory.seen | active,
    )


def gradnorm(
    num_tasks: int, *, alpha: float = 1.5, learning_rate: float = 0.025
) -> Aggregator:
    """Weigh tasks so that their gradients are equally long, those of slow tasks longer.

    `d = sum_k λ_k g_k` with learned weights `λ`, 1 at first, that sum to the number of
    tasks. With `l_k = λ_k |g_k|`, `l̄` their mean and `r_k` what task `k` has left of
    its first loss, `L_k / L_k(0)`, over the mean of that, each step descends
    `sum_k |l_k − l̄ r_k^alpha|` in `λ`, where `l̄ r_k^alpha` is held fixed. The step
    shows in the next direction. It is

        λ_k ← λ_k exp(−learning_rate sign(l_k − l̄ r_k^alpha)),

    then scaled to the sum. The slope by `λ_k` is that sign times `|g_k|`; only the sign
    is used, as by optimizers that divide out the size of a slope, and it moves the
    logarithm. A step of `learning_rate sign(...) |g_k|` in `λ` itself would depend on
    the scale of the gradients, and turn weights negative where lengths are very
    unequal. So weights settle to within the learning rate, and take
    `log(ratio) / learning_rate` steps, or half of it, to even out a ratio of lengths.

    The authors take the lengths at the last shared layer only. `where` does so with a
    predicate that chooses it, but weighs no more than that layer: combine the rest by
    `weighted_sum` with the weights in the state. Losses are taken to be nonnegative,
    and a task whose first loss is 0 counts as having all of it left.

    The first step is the plain sum. Scaling all gradients, or what is given as a task's
    losses, changes no weight. A zero gradient asks for no step; opposite gradients
    cancel as far as their weighted lengths agree; duplicates count twice. An inactive
    task keeps its multiplier and first loss, while those active redistribute what they
    have together; in `d` that is scaled to sum to their number. Cost: the Gramian, of
    which only the lengths are used; the state keeps three numbers a task.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        alpha: How much longer the gradients of slow tasks are to be; 0 makes all equal.
        learning_rate: Step size of the weights' logarithms.

    Returns:
        An aggregator that needs `losses`; see `from_weights`. Its state's memory is a
        `GradNormMemory`.

    Raises:
        ValueError: If `num_tasks < 1`, `alpha < 0` or `learning_rate < 0`.

    References:
        Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in
        Deep Multitask Networks, ICML 2018, https://arxiv.org/abs/1711.02257.
    """
    for name, value in (("alpha", alpha), ("learning_rate", learning_rate)):
        if value < 0:
            raise ValueError(f"{name} is {value}; pass 0 or more.")

    def initial_memory(dtype: jnp.dtype) -> GradNormMemory:
        return GradNormMemory(
            multipliers=jnp.ones(num_tasks, dtype),
            initial_losses=jnp.zeros(num_tasks, dtype),
            seen=jnp.zeros(num_tasks, bool),
        )

    def weigh(
        gramian: Array, active: Array, memory: GradNormMemory, losses: Array
    ) -> tuple[Array, GradNormMemory]:
        return weights(
            gramian,
            losses,
            memory,
            active,
            alpha=alpha,
            learning_rate=learning_rate,
        )

    return from_weights(weigh, num_tasks, memory=initial_memory, needs_losses=True)
