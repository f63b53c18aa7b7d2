"""AWL: uncertainty weighting with a regulariser that stays positive."""

import jax.numpy as jnp
from jaxtyping import Array

from mtl_jax.optim.balancer import Balancer, make_balancer
from mtl_jax.optim.learned import LearnedState, make_learner


def awl(num_tasks: int, *, learning_rate: float = 0.025) -> Balancer:
    """Weigh each task by its learned noise level, never rewarding a small one.

    The objective is `sum_k L_k / (2 p_k²) + log(1 + p_k²)`, so that
    `w_k = 1 / (2 p_k²)`. Unlike the `log p_k` of uncertainty weighting, the regulariser
    cannot become negative, and no objective falls without bound. `p_k` begins with 1
    and follows `p² = (L + sqrt(L² + 8L)) / 4`. It is learned in the state by Adam
    without weight decay.

    Where `|p_k|` is less than the precision of the type (1e-7 in float32), its sign
    is kept and its size taken as that. Losses of any size are fine; with a loss that
    stays 0 or negative `p_k` wanders about 0 and its weight is large, 4e13 at most in
    float32: use it for positive losses.

    Args:
        num_tasks: Number of tasks.
        learning_rate: Step size of the Adam that learns `p`.

    Returns:
        A balancer whose state is a `LearnedState` of `p`; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1` or `learning_rate < 0`.

    References:
        Liebel and Körner, Auxiliary Tasks in Multi-task Learning, 2018,
        https://arxiv.org/abs/1805.06334; used by Chen et al., Mod-Squad, CVPR 2023,
        https://arxiv.org/abs/2212.08066.
    """
    learner = make_learner(num_tasks, initial=1.0, learning_rate=learning_rate)

    def weigh(
        losses: Array, state: LearnedState, active: Array
    ) -> tuple[Array, LearnedState]:
        least = jnp.finfo(losses.dtype).eps
        size = jnp.maximum(jnp.abs(state.values), least)
        scale = jnp.copysign(size, state.values)
        values = 0.5 / size**2
        gradients = 2 * (scale / (1 + size**2) - values * losses / scale)
        learned = learner.step(gradients, state, active)
        return jnp.where(active, values, 0), learned

    return make_balancer(weigh, num_tasks, init=learner.init)
