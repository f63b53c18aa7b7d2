"""Random weights of the task gradients, drawn anew every step."""

import jax
from jaxtyping import Array, PRNGKeyArray

from mtl_jax.optim.aggregator import Aggregator, from_weights
from mtl_jax.optim.balancer import softmax_weights


def random(num_tasks: int, *, seed: int = 0) -> Aggregator:
    """Combine the task gradients with `w = softmax(n)`, `n` standard normal.

    On average `d` is the mean of the task gradients. `rlw` does the same to losses,
    with one backward pass; this is for comparison with methods that need them all.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        seed: Seed of the weights; the key is kept in the state.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Lin et al., Reasonable Effectiveness of Random Weighting: A Litmus Test for
        Multi-Task Learning, TMLR 2022, https://arxiv.org/abs/2111.10603.
    """

    def weigh(gramian: Array, active: Array, key: PRNGKeyArray) -> Array:
        logits = jax.random.normal(key, (num_tasks,), gramian.dtype)
        return softmax_weights(logits, active)

    return from_weights(weigh, num_tasks, seed=seed)
