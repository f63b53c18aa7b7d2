"""The training step: a pure function of state and batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_jax.data.batch import Batch
from mtl_jax.optim import Balancer, conflict_rate, cosine_similarity
from mtl_jax.train.faults import (
    REPORT,
    FaultReport,
    NonFinite,
    keep_if,
    must_skip,
    take_note,
)
from mtl_jax.train.gradients import Evaluation, GradientFunction
from mtl_jax.train.objective import Objective
from mtl_jax.train.state import TrainState

Metrics = Mapping[str, Array]
"""Flat names ``task/metric`` (``all/metric`` for the whole) -> arrays."""

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


ROUTER_METRICS = {
    "dropped": "dropped_tokens",
    "dead": "dead_experts",
    "entropy": "gate_entropy",
}
"""Statistic of a layer of experts -> its name in metrics, by layer and averaged."""


def make_train_step(
    gradient_function: GradientFunction,
    optimizer: optax.GradientTransformation,
    task_names: tuple[str, ...],
    non_finite: NonFinite = "leave_out",
) -> Step:
    """One step of training.

    A step that must be skipped leaves parameters, collections and the states of
    optimizer and aggregator as they were; its number and the data go on.

    Args:
      gradient_function: From `mtl_jax.train.gradients`, perhaps made
        sharpness-aware.
      optimizer: Optax chain that turns the aggregated gradient into an update.
      task_names: Names of the tasks in order, for the metrics.
      non_finite: Whether a task whose loss or gradient is not finite is left out of the
        step (``leave_out``), or the step skipped (``skip``).

    Returns:
      A pure function ``(state, batch) -> (state, metrics)``, to be jitted.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        evaluation, gradient = gradient_function(
            state.params, batch, key, state.aggregator_state, state.collections
        )
        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer_state, state.params
        )
        gradient_norm = optax.tree.norm(gradient)
        kept = state.aggregator_state, state.collections
        skipped = must_skip(evaluation, gradient_norm, kept, non_finite)
        after = TrainState(
            state.step + 1,
            optax.apply_updates(state.params, updates),  # type: ignore[arg-type]
            evaluation.aggregator_state,
            optimizer_state,
            state.key,
            evaluation.collections,
            state.faults,
        )
        before = dataclasses.replace(state, step=after.step)
        state = keep_if(skipped, before, after)
        parameter_norm = optax.tree.norm(state.params)
        faults, report = take_note(state.faults, evaluation, skipped, parameter_norm)
        state = dataclasses.replace(state, faults=faults)
        metrics = {
            **task_metrics(evaluation, task_names),
            "all/loss": jnp.sum(jnp.where(evaluation.active, evaluation.losses, 0.0)),
            "all/auxiliary_loss": evaluation.auxiliary_loss,
            "all/gradient_norm": gradient_norm,
            "all/update_norm": optax.tree.norm(updates),
            "all/parameter_norm": parameter_norm,
            "all/learning_rate": optax.tree.get(
                optimizer_state,
                "learning_rate",
                filtering=lambda _, value: isinstance(value, jax.Array),
            ),
            "all/skipped_steps": skipped.astype(jnp.int32),
            REPORT: report,
        }
        return state, {k: v for k, v in metrics.items() if v is not None}

    return step


def observing(step: Step, objective: Objective, balancer: Balancer) -> Step:
    """Shows a balancer the losses of the same batch after every update.

    Args:
      step: Training step whose aggregator state is a `BalancerState`.
      objective: The losses; evaluated once more, with the same key.
      balancer: One that has an ``observe``.

    Returns:
      The step at the cost of one more forward pass.
    """
    observe = balancer.observe
    assert observe is not None

    def observed(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        state, metrics = step(state, batch)
        losses, _ = objective.losses(state.params, batch, key, state.collections)
        balance, report = state.aggregator_state, FaultReport(*metrics[REPORT])
        took_part = (objective.label_counts(batch) > 0) & (report.faulty == 0)
        memory = observe(losses, balance.memory, took_part & jnp.isfinite(losses))
        memory = keep_if(report.skipped[0] > 0, balance.memory, memory)
        state = dataclasses.replace(
            state,
            aggregator_state=balance._replace(memory=memory),
        )
        return state, metrics

    return observed


def task_metrics(evaluation: Evaluation, task_names: tuple[str, ...]) -> dict[str, Any]:
    """Losses, gradient geometry and router statistics by flat name."""
    norms = jnp.sqrt(jnp.diagonal(evaluation.gramian))
    weights = getattr(evaluation.aggregator_state, "weights", None)
    both_active = evaluation.active[:, None] & evaluation.active[None, :]
    metrics: dict[str, Any] = {
        "all/cosine": jnp.where(
            both_active, cosine_similarity(evaluation.gramian), jnp.nan
        ),
        "all/conflict_rate": conflict_rate(evaluation.gramian, evaluation.active),
    }
    for k, task in enumerate(task_names):
        metrics[f"{task}/loss"] = evaluation.losses[k]
        metrics[f"{task}/gradient_norm"] = norms[k]
        metrics[f"{task}/left_out"] = evaluation.faulty[k].astype(jnp.int32)
        if weights is not None:
            metrics[f"{task}/weight"] = weights[k]
        blocks = evaluation.statistics[task]
        for block, statistics in blocks.items():
            metrics[f"{task}/expert_load/{block}"] = statistics["load"]
            for name, metric in ROUTER_METRICS.items():
                metrics[f"{task}/{metric}/{block}"] = statistics[name]
        for name, metric in ROUTER_METRICS.items():
            if blocks:
                values = [statistics[name] for statistics in blocks.values()]
                metrics[f"{task}/{metric}"] = jnp.mean(jnp.stack(values))
    for block in next(iter(evaluation.statistics.values())):
        loads = jnp.stack(
            [evaluation.statistics[task][block]["load"] for task in task_names]
        )
        metrics[f"all/dead_experts/{block}"] = jnp.mean(jnp.all(loads == 0, axis=0))
        metrics[f"all/task_expert_information/{block}"] = task_expert_information(loads)
    return metrics


def task_expert_information(
    load: Float[Array, "tasks experts"],
) -> Float[Array, ""]:
    """Mutual information of task and expert in nats, all tasks weighing the same.

    It is 0 where all tasks use the experts alike, and ``log tasks`` where each has
    experts to itself.

    Args:
      load: Share of each task's assignments that each expert has.
    """
    joint = load / load.shape[0]
    independent = jnp.mean(load, axis=0, keepdims=True) / load.shape[0]
    return jnp.sum(
        jax.scipy.special.rel_entr(joint, jnp.broadcast_to(independent, joint.shape))
    )
