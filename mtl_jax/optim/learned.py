"""Numbers that a balancer learns, one a task, by an Adam of its own."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float


class LearnedState(NamedTuple):
    """What a balancer has learned.

    Attributes:
        values: One number a task.
        optimizer: State of Adam, every leaf of it one a task: a task that is absent for
            a while comes back to its own moments and its own count of steps.
    """

    values: Float[Array, " tasks"]
    optimizer: optax.OptState


class Learner(NamedTuple):
    """Two pure functions that learn one number a task.

    Attributes:
        init: `() -> state`.
        step: `(gradients [tasks], state, active [tasks]) -> state`, one step against
            the gradients; inactive tasks stay as they are.
    """

    init: Callable[[], LearnedState]
    step: Callable[..., LearnedState]


def make_learner(
    num_tasks: int,
    *,
    initial: float,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> Learner:
    """Learn one number a task with Adam, the tasks apart from each other.

    Gradients are bounded, to about 1e19 in float32, so that their squares stay finite.

    Args:
        num_tasks: Number of tasks.
        initial: What every task begins with.
        learning_rate: Step size of Adam.
        weight_decay: Share of the values added to the gradients, before Adam's moments:
            the decay of `torch.optim.Adam`, not that of AdamW.

    Returns:
        The learner.

    Raises:
        ValueError: If `learning_rate` or `weight_decay` is negative.
    """
    for name, value in (
        ("learning_rate", learning_rate),
        ("weight_decay", weight_decay),
    ):
        if value < 0:
            raise ValueError(f"{name} is {value}; pass 0 or more.")
    optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(learning_rate)
    )

    def init() -> LearnedState:
        values = jnp.full(num_tasks, initial, float)
        return LearnedState(values, jax.vmap(optimizer.init)(values))

    def step(
        gradients: Float[Array, " tasks"],
        state: LearnedState,
        active: Bool[Array, " tasks"],
    ) -> LearnedState:
        limit = 0.5 * jnp.sqrt(jnp.finfo(gradients.dtype).max)
        gradients = jnp.clip(gradients, -limit, limit)
        # Adam raises floats to the power of its integer count.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = jax.vmap(optimizer.update)(
                gradients, state.optimizer, state.values
            )
        values = jax.tree.map(jnp.add, state.values, updates)
        moved = LearnedState(values, moments)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, state)

    return Learner(init, step)
