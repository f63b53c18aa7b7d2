"""STCH: a smooth maximum of the losses, each in units of where its warm-up ended."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.optim.aggregator import all_active
from mtl_jax.optim.balancer import (
    Balancer,
    log_limit,
    make_balancer,
    positive_losses,
)
from mtl_jax.optim.scale_invariant import weights as logarithmic_weights


class StchState(NamedTuple):
    """Progress of the warm-up of each task.

    Attributes:
        seen: Steps in which the task was active, up to the length of the warm-up.
        nadir: Average loss over the end of the warm-up, 0 before that.
    """

    seen: Int[Array, " tasks"]
    nadir: Float[Array, " tasks"]


def weights(
    losses: Float[Array, " tasks"],
    nadir: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    mu: float = 1.0,
) -> Float[Array, " tasks"]:
    """Derivatives of `K mu log sum_k exp(f_k / mu)` with `f_k = log(L_k / nadir_k)`.

    Args:
        losses: Losses of all tasks.
        nadir: A positive unit of each loss.
        active: Which tasks are present; all by default.
        mu: The smaller, the closer to the maximum.

    Returns:
        Weights of the losses' dtype, 0 for absent tasks; `sum_k w_k L_k` is the number
        `K` of present tasks.
    """
    active = all_active(losses.shape[0]) if active is None else active
    losses, present = positive_losses(losses, active)
    logs = jnp.log(losses)
    nadir = jnp.maximum(nadir, jnp.finfo(losses.dtype).tiny)
    levels = jnp.where(present, (logs - jnp.log(nadir)) / mu, -jnp.inf)
    count = jnp.sum(present).astype(losses.dtype)
    # The share of a small loss may vanish where its quotient with the loss does not.
    values = jnp.log(count) + jax.nn.log_softmax(levels) - logs
    limit = log_limit(losses.dtype)
    return jnp.where(present, jnp.exp(jnp.clip(values, -limit, limit)), 0)


def stch(
    num_tasks: int,
    *,
    mu: float = 1.0,
    warmup_steps: int,
    nadir_steps: int | None = None,
) -> Balancer:
    """Minimise a smooth maximum of the logarithms of the losses, after a warm-up.

    The warm-up minimises `sum_k log L_k`; over its last `nadir_steps` each loss is
    averaged: its nadir `n_k`. After it the objective is
    `K mu log sum_k exp(f_k / mu)` with `f_k = log(L_k / n_k)`, so that
    `w_k = K softmax(f / mu)_k / L_k`: tasks that have improved least since the warm-up
    weigh most. `sum_k w_k L_k = K` in both phases. With `mu = 1` the objective is
    `K log sum_k L_k / n_k`.

    Each task counts only the steps in which it was active; while some are still in
    their warm-up, the smooth maximum runs over the others. A task whose loss is 0,
    negative or below the smallest normal number has no logarithm and counts as absent,
    though it enters the nadir. Losses of any size are fine; weights are bounded by 1e38
    in float32.

    Args:
        num_tasks: Number of tasks.
        mu: The smaller, the closer to the maximum.
        warmup_steps: Steps of the warm-up, four or five epochs in the published runs.
        nadir_steps: Steps at its end that the nadir is averaged over; a fifth of the
            warm-up by default, the last of five epochs.

    Returns:
        A balancer whose state is a `StchState`; see `make_balancer`.

    Raises:
        ValueError: If `num_tasks < 1`, `mu <= 0`, or not
            `1 <= nadir_steps <= warmup_steps`.

    References:
        Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization,
        ICML 2024, https://arxiv.org/abs/2402.19078.
    """
    if mu <= 0:
        raise ValueError(f"mu is {mu}; pass more than 0.")
    nadir_steps = math.ceil(warmup_steps / 5) if nadir_steps is None else nadir_steps
    if not 1 <= nadir_steps <= warmup_steps:
        raise ValueError(
            f"nadir_steps is {nadir_steps} and warmup_steps {warmup_steps}; the nadir "
            "needs 1 step or more at the end of the warm-up."
        )

    def init() -> StchState:
        return StchState(jnp.zeros(num_tasks, jnp.int32), jnp.zeros(num_tasks))

    def weigh(
        losses: Array, state: StchState, active: Array
    ) -> tuple[Array, StchState]:
        warm = state.seen >= warmup_steps
        values = jnp.where(
            warm,
            weights(losses, state.nadir, active & warm, mu=mu),
            logarithmic_weights(losses, active & ~warm),
        )
        averaged = state.seen - (warmup_steps - nadir_steps)
        share = 1 / jnp.maximum(averaged + 1, 1).astype(losses.dtype)
        nadir = jnp.where(
            active & ~warm & (averaged >= 0),
            (1 - share) * state.nadir + share * losses,
            state.nadir,
        )
        seen = state.seen + (active & ~warm).astype(state.seen.dtype)
        return values, StchState(seen, nadir)

    return make_balancer(weigh, num_tasks, init=init)
