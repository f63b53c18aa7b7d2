"""DWA: more weight for tasks whose loss falls slowly."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.optim.aggregator import all_active
from mtl_jax.optim.balancer import Balancer, make_balancer, softmax_weights


class DwaState(NamedTuple):
    """Average losses of each task, over windows of the steps in which it was active.

    Attributes:
        steps: Steps in the running window.
        mean: Average loss of the running window, 0 before its first step.
        latest: Average loss of the latest full window, 0 before there is one.
        previous: Average loss of the full window before that.
    """

    steps: Int[Array, " tasks"]
    mean: Float[Array, " tasks"]
    latest: Float[Array, " tasks"]
    previous: Float[Array, " tasks"]


def weights(
    latest: Float[Array, " tasks"],
    previous: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    temperature: float = 2.0,
) -> Float[Array, " tasks"]:
    """Softmax of the ratio of two average losses, times the number of active tasks.

    Args:
        latest: Average loss of each task in the latest window.
        previous: Average loss in the window before; where it is 0, the ratio is 1.
        active: Which tasks are present; all by default.
        temperature: The larger, the more equal the weights.

    Returns:
        Weights of the losses' dtype, 0 for inactive tasks.
    """
    active = all_active(latest.shape[0]) if active is None else active
    limits = jnp.finfo(latest.dtype)
    known = jnp.abs(previous) >= limits.tiny
    ratio = jnp.where(known, latest / jnp.where(known, previous, 1), 1)
    logits = jnp.clip(ratio / temperature, limits.min, limits.max)
    count = jnp.sum(active).astype(latest.dtype)
    return count * softmax_weights(logits, active)


def dwa(num_tasks: int, *, temperature: float = 2.0, window: int = 25) -> Balancer:
    """Weigh tasks by how slowly their losses fall from window to window.

    `w = K softmax(r / T)` with `r_k` the average loss of the latest full window over
    that of the window before; the weights are 1 during the first two windows. The paper
    takes epochs for windows: pass the steps of an epoch to have it so. Windows do not
    overlap, and each task counts only the steps in which it was active; a task without
    two full windows has `r_k = 1`.

    A task whose window before averages 0 has `r_k = 1` too. Losses may be huge;
    negative ones are meaningful only while they keep their sign.

    Args:
        num_tasks: Number of tasks.
        temperature: The larger, the more equal the weights.
        window: Steps of a window.

    Returns:
        A balancer whose state is a `DwaState`; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`, `temperature <= 0` or `window < 1`.

    References:
        Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR
        2019, https://arxiv.org/abs/1803.10704.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; pass more than 0.")
    if window < 1:
        raise ValueError(f"window is {window}; pass 1 or more.")

    def init() -> DwaState:
        # One array a field: a buffer that is there twice cannot be donated.
        sums = (jnp.zeros(num_tasks) for _ in range(3))
        return DwaState(jnp.zeros(num_tasks, jnp.int32), *sums)

    def weigh(losses: Array, state: DwaState, active: Array) -> tuple[Array, DwaState]:
        values = weights(state.latest, state.previous, active, temperature=temperature)
        steps = state.steps + active.astype(state.steps.dtype)
        share = 1 / jnp.maximum(steps, 1).astype(losses.dtype)
        # Weighed apart: the difference of two huge losses could overflow.
        mean = (1 - share) * state.mean + share * losses
        mean = jnp.where(active, mean, state.mean)
        full = steps == window
        return values, DwaState(
            steps=jnp.where(full, 0, steps),
            mean=jnp.where(full, 0, mean),
            latest=jnp.where(full, mean, state.latest),
            previous=jnp.where(full, state.latest, state.previous),
        )

    return make_balancer(weigh, num_tasks, init=init)
