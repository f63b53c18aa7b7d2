"""UW-SO: softmax of the inverse losses, uncertainty weighting without learning."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import all_active
from mtl_jax.optim.balancer import (
    Balancer,
    make_balancer,
    positive_losses,
    softmax_weights,
)


def weights(
    losses: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    temperature: float = 1.0,
) -> Float[Array, " tasks"]:
    """Softmax of `1 / (temperature L_k)` over the tasks with a positive loss.

    Args:
        losses: Losses of all tasks.
        active: Which tasks are present; all by default.
        temperature: The larger, the more equal the weights.

    Returns:
        Weights of the losses' dtype with sum 1, 0 for absent tasks.
    """
    active = all_active(losses.shape[0]) if active is None else active
    losses, present = positive_losses(losses, active)
    logits = jnp.minimum(1 / losses / temperature, jnp.finfo(losses.dtype).max)
    return softmax_weights(logits, present)


def uw_so(num_tasks: int, *, temperature: float = 1.0) -> Balancer:
    """Weigh tasks by the softmax of their inverse losses.

    `w = softmax(1 / (T L))`, constants of the backward pass. `1 / L_k` is the weight
    that uncertainty weighting would settle at for this very loss; the softmax keeps the
    sum at 1 and tames tasks whose loss is small. The right temperature depends on the
    size of the losses: it is to be tuned.

    A task whose loss is 0, negative or below the smallest normal number has no inverse
    and counts as absent. Losses of any size are fine: the smallest takes all where the
    others are far from it.

    Args:
        num_tasks: Number of tasks.
        temperature: The larger, the more equal the weights.

    Returns:
        A balancer without state; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1` or `temperature <= 0`.

    References:
        Kirchdorfer et al., Analytical Uncertainty-Based Loss Weighting in Multi-Task
        Learning, GCPR 2024, https://arxiv.org/abs/2408.07985.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; pass more than 0.")

    def weigh(losses: Array, state: None, active: Array) -> tuple[Array, None]:
        return weights(losses, active, temperature=temperature), state

    return make_balancer(weigh, num_tasks)
