"""FAMO: learn weights so that all losses fall at one rate."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import all_active
from mtl_jax.optim.balancer import Balancer, make_balancer, softmax_weights
from mtl_jax.optim.learned import LearnedState, make_learner

_EPSILON = 1e-8


class FamoState(NamedTuple):
    """What FAMO carries from step to step.

    Attributes:
        logits: Learned logits of the tasks.
        losses: Losses of the latest step in which each task was weighed.
        pending: Tasks of the latest step, until they are observed.
    """

    logits: LearnedState
    losses: Float[Array, " tasks"]
    pending: Bool[Array, " tasks"]


def weights(
    losses: Float[Array, " tasks"],
    logits: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    minimum_losses: float | Sequence[float] = 0.0,
) -> Float[Array, " tasks"]:
    """`c z_k / D_k` with `z = softmax(logits)`, `D = L - minimum + 1e-8`, and sum 1.

    Args:
        losses: Losses of all tasks.
        logits: Logits of the tasks.
        active: Which tasks are present; all by default.
        minimum_losses: Lower bounds of the losses, one for all tasks or one a task.

    Returns:
        Weights of the losses' dtype, 0 for inactive tasks.
    """
    active = all_active(losses.shape[0]) if active is None else active
    # The normalised quotient of a softmax is a softmax, and cannot overflow.
    return softmax_weights(logits - jnp.log(_gap(losses, minimum_losses)), active)


def famo(
    num_tasks: int,
    *,
    learning_rate: float = 0.025,
    weight_decay: float = 1e-3,
    minimum_losses: float | Sequence[float] = 0.0,
) -> Balancer:
    """Weigh tasks so that the logarithms of all losses fall by the same amount.

    With `z = softmax(ξ)` and `D_k = L_k - b_k + 1e-8`, the objective is
    `c sum_k z_k log D_k` with the constant `c = 1 / sum_k (z_k / D_k)`, so that
    `w_k = c z_k / D_k` and the weights sum to 1. Once the model has been updated,
    `observe` must be given the losses of the same batch again: `ξ` takes a step of Adam
    along `(dz/dξ)ᵀ δ` with `δ_k = log D_k(before) - log D_k(after)`, which moves weight
    to the tasks whose loss fell less. Its weight decay is added to the gradient, as in
    the reference code. Without `observe` the `ξ` stay as they are.

    Cost: one forward pass more than the plain sum.

    `D` is at least 1e-8, where `L_k ≤ b_k`; losses far below 1e-8 are all alike to this
    method. Huge losses are fine.

    Args:
        num_tasks: Number of tasks.
        learning_rate: Step size of the Adam that learns `ξ`.
        weight_decay: Decay of `ξ` towards equal `z`; 1e-3 in most published runs, 1e-2
            for Cityscapes.
        minimum_losses: Lower bounds `b` of the losses, one for all tasks or one a task.

    Returns:
        A balancer with `observe`, whose state is a `FamoState`; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`, `learning_rate` or `weight_decay` is negative,
            or `minimum_losses` is not one a task.

    References:
        Liu et al., FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023,
        https://arxiv.org/abs/2306.03792.
    """
    if np.shape(minimum_losses) not in ((), (num_tasks,)):
        raise ValueError(
            f"minimum_losses has shape {np.shape(minimum_losses)}; pass a number, or "
            f"one for each of the {num_tasks} tasks."
        )
    learner = make_learner(
        num_tasks,
        initial=0.0,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )

    def init() -> FamoState:
        return FamoState(
            learner.init(), jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool)
        )

    def weigh(
        losses: Array, state: FamoState, active: Array
    ) -> tuple[Array, FamoState]:
        values = weights(
            losses, state.logits.values, active, minimum_losses=minimum_losses
        )
        before = jnp.where(active, losses, state.losses)
        return values, FamoState(state.logits, before, active)

    def observe(losses: Array, state: FamoState, active: Array) -> FamoState:
        active = active & state.pending
        # The quotient keeps digits of a small fall that logarithms would round off.
        before, after = (_gap(x, minimum_losses) for x in (state.losses, losses))
        limits = jnp.finfo(losses.dtype)
        fall = jnp.log(jnp.clip(before / after, limits.tiny, limits.max))
        shares = softmax_weights(state.logits.values, active)
        gradients = shares * (fall - jnp.sum(shares * fall))
        logits = learner.step(gradients, state.logits, active)
        return FamoState(logits, state.losses, state.pending & ~active)

    return make_balancer(weigh, num_tasks, init=init, observe=observe)


def _gap(
    losses: Float[Array, " tasks"], minimum_losses: float | Sequence[float]
) -> Float[Array, " tasks"]:
    """`D`, how far each loss is above its lower bound."""
    minimum = jnp.broadcast_to(jnp.asarray(minimum_losses, losses.dtype), losses.shape)
    return jnp.maximum(losses - minimum, 0) + _EPSILON
