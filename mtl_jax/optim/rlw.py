"""RLW: random weights, drawn anew every step."""

import jax
from jaxtyping import Array, PRNGKeyArray

from mtl_jax.optim.balancer import Balancer, make_balancer, softmax_weights


def rlw(num_tasks: int, *, seed: int = 0) -> Balancer:
    """Weigh tasks at random: `w = softmax(n)` with `n` standard normal.

    On average every weight is `1/K`; the noise is that of stochastic optimization. As
    the sum of the weights is 1, the step is that of the summed losses at a learning
    rate `K` times smaller. A baseline that other methods should beat.

    Any loss will do: 0, negative or huge.

    Args:
        num_tasks: Number of tasks.
        seed: Seed of the weights; the key is kept in the state.

    Returns:
        A balancer whose state is a typed key; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Lin et al., Reasonable Effectiveness of Random Weighting: A Litmus Test for
        Multi-Task Learning, TMLR 2022, https://arxiv.org/abs/2111.10603.
    """

    def weigh(
        losses: Array, state: PRNGKeyArray, active: Array
    ) -> tuple[Array, PRNGKeyArray]:
        key, subkey = jax.random.split(state)
        logits = jax.random.normal(subkey, (num_tasks,), losses.dtype)
        return softmax_weights(logits, active), key

    return make_balancer(weigh, num_tasks, init=lambda: jax.random.key(seed))
