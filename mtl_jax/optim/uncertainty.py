"""Uncertainty weighting: a learned noise level a task."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mtl_jax.optim.balancer import Balancer, log_limit, make_balancer
from mtl_jax.optim.learned import LearnedState, make_learner

Form = Literal["regression", "classification"]
_FACTORS = {"regression": 0.5, "classification": 1.0}


def uncertainty(
    num_tasks: int,
    *,
    form: Form | Sequence[Form] = "regression",
    learning_rate: float = 0.025,
    initial: float = 0.0,
) -> Balancer:
    """Weigh each task by its learned noise level.

    The objective is `sum_k ½(exp(-s_k) L_k + s_k)` for regression, the negative log
    likelihood of a Gaussian with log variance `s_k`, and `sum_k exp(-s_k) L_k + ½ s_k`
    for classification, that of a softmax at temperature `exp(s_k)`. Hence
    `w_k = ½ exp(-s_k)` or `exp(-s_k)`, and `s_k` follows `log L_k` (`log 2 L_k`). The
    `s_k` are learned in the state by Adam without weight decay: on the model's own
    optimizer they would share its learning rate, too small for them, and its decay.

    `s_k` is kept where `exp(±s_k)` is a normal number, 87 in float32. Losses of any
    size are fine; a loss that stays 0 or negative drives its `s_k` to that bound and
    its weight, by `learning_rate` a step, to 1e38: use it for positive losses.

    Args:
        num_tasks: Number of tasks.
        form: Kind of loss, one for all tasks or one a task.
        learning_rate: Step size of the Adam that learns `s`.
        initial: What every `s_k` begins with.

    Returns:
        A balancer whose state is a `LearnedState` of `s`; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`, `learning_rate < 0`, or `form` is unknown or not
            one a task.

    References:
        Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses
        for Scene Geometry and Semantics, CVPR 2018, https://arxiv.org/abs/1705.07115.
    """
    forms = [form] * num_tasks if isinstance(form, str) else list(form)
    if len(forms) != num_tasks or not set(forms) <= set(_FACTORS):
        raise ValueError(
            f"form is {form!r}; pass one of {sorted(_FACTORS)}, or one of them for "
            f"each of the {num_tasks} tasks."
        )
    factors = np.array([_FACTORS[name] for name in forms])
    learner = make_learner(num_tasks, initial=initial, learning_rate=learning_rate)

    def weigh(
        losses: Array, state: LearnedState, active: Array
    ) -> tuple[Array, LearnedState]:
        values = jnp.asarray(factors, losses.dtype) * jnp.exp(-state.values)
        learned = learner.step(0.5 - values * losses, state, active)
        limit = log_limit(losses.dtype)
        learned = learned._replace(values=jnp.clip(learned.values, -limit, limit))
        return jnp.where(active, values, 0), learned

    return make_balancer(weigh, num_tasks, init=learner.init)
