"""Fixed weights of the task gradients."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from mtl_jax.optim.aggregator import Aggregator, from_weights


def constant(num_tasks: int, weights: Sequence[float]) -> Aggregator:
    """Combine the task gradients with weights chosen beforehand: `d = sum_k w_k g_k`.

    The gradient of a weighted sum of losses, at the cost of `sum`.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        weights: One finite number a task. An inactive task has weight 0; the weights
            of the others stay as they are.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`, or `weights` is not `num_tasks` finite numbers.
    """
    if len(weights) != num_tasks or not all(math.isfinite(value) for value in weights):
        raise ValueError(
            f"weights is {tuple(weights)}; pass {num_tasks} finite numbers, one a task."
        )

    def weigh(gramian: Array, active: Array) -> Array:
        return jnp.where(active, jnp.asarray(weights, gramian.dtype), 0)

    return from_weights(weigh, num_tasks)
