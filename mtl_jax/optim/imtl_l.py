"""IMTL-L: learned scales that bring all losses to one size."""

import jax.numpy as jnp
from jaxtyping import Array

from mtl_jax.optim.balancer import Balancer, log_limit, make_balancer
from mtl_jax.optim.learned import LearnedState, make_learner


def imtl_l(num_tasks: int, *, learning_rate: float = 0.025) -> Balancer:
    """Scale each loss by a learned factor that makes the scaled losses equal.

    The objective is `sum_k exp(s_k) L_k - s_k`, so that `w_k = exp(s_k)`, and `s_k`
    follows `-log L_k`, where every scaled loss is 1. The `s_k` begin with 0 and are
    learned in the state by Adam without weight decay.

    `s_k` is kept where `exp(±s_k)` is a normal number, 87 in float32. Losses of any
    size are fine; a loss that stays 0 or negative drives its `s_k` to that bound and
    its weight, by `learning_rate` a step, to 1e38: use it for positive losses.

    Args:
        num_tasks: Number of tasks.
        learning_rate: Step size of the Adam that learns `s`.

    Returns:
        A balancer whose state is a `LearnedState` of `s`; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1` or `learning_rate < 0`.

    References:
        Liu et al., Towards Impartial Multi-task Learning, ICLR 2021,
        https://openreview.net/forum?id=IMPnRXEWpvr.
    """
    learner = make_learner(num_tasks, initial=0.0, learning_rate=learning_rate)

    def weigh(
        losses: Array, state: LearnedState, active: Array
    ) -> tuple[Array, LearnedState]:
        values = jnp.exp(state.values)
        learned = learner.step(values * losses - 1, state, active)
        limit = log_limit(losses.dtype)
        learned = learned._replace(values=jnp.clip(learned.values, -limit, limit))
        return jnp.where(active, values, 0), learned

    return make_balancer(weigh, num_tasks, init=learner.init)
