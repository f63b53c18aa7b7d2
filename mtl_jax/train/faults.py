"""Numerical faults: what becomes of a step whose numbers are not all finite.

`mtl_jax.train.gradients` leaves a task out whose own loss or gradient is not finite.
What is done here happens once the new state is computed: it is taken back where it must
not be kept, and every step reports what went wrong. All of it is part of the compiled
step, and what it remembers part of the training state, so that an interruption changes
nothing.
"""

from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.train.gradients import Evaluation

NonFinite = Literal["leave_out", "skip"]
"""What a step does about a task whose loss or gradient is not finite: go on without it,
or not happen."""

REPORT = "all/faults"
"""Name of a step's packed `FaultReport` among its metrics."""

WINDOW = 100
"""How many of its latest losses a task's loss is compared with."""

FEWEST = 30
"""How many there must be before a loss can be called a spike."""

DEVIATIONS = 6.0
"""How many standard deviations above their mean a spike is."""

LEAST_DEVIATION = 0.01
"""The least standard deviation, as a part of the mean: losses that hardly change have
spikes of at least `DEVIATIONS` times that."""

SMALL = 4096
"""Entries of the largest array that is looked through for what is not finite. What an
aggregator keeps for tasks and their pairs is smaller; what it keeps for each parameter
follows the gradient, whose norm tells."""

Tree = TypeVar("Tree")


class FaultState(NamedTuple):
    """What a run remembers of its faults.

    Attributes:
      in_a_row: Number of latest steps that each had a fault.
      task_in_a_row: Number of latest steps with a label of each task that each found
        the task at fault.
      left_out: Number of steps so far in which each task's loss or gradient was not
        finite.
      skipped: Number of steps so far that were skipped.
      recent: Latest finite losses of each task, the newest last; NaN where there have
        been fewer.
    """

    in_a_row: Int[Array, ""]
    task_in_a_row: Int[Array, " tasks"]
    left_out: Int[Array, " tasks"]
    skipped: Int[Array, ""]
    recent: Float[Array, "tasks window"]


class FaultReport(NamedTuple):
    """What a step tells of its faults, `[tasks]` each.

    Attributes:
      loss: Loss of each task, finite or not.
      faulty: Whether the task's loss or gradient was not finite.
      skipped: Whether the whole step was skipped; of all tasks the same.
      in_a_row: Number of steps up to this that had a fault; of all tasks the same.
      task_in_a_row: Number of latest steps with a label of the task that each found it
        at fault.
      left_out: Number of steps of the run in which the task was faulty.
      skipped_steps: Number of steps of the run that were skipped; of all tasks the
        same.
      mean: Mean of the task's latest losses before this step.
      limit: What a loss must exceed to be a spike; infinite while there are too few.
      spike: Whether it does.
      finite: Whether the parameters are, after the step; of all tasks the same.
    """

    loss: Any
    faulty: Any
    skipped: Any
    in_a_row: Any
    task_in_a_row: Any
    left_out: Any
    skipped_steps: Any
    mean: Any
    limit: Any
    spike: Any
    finite: Any


def no_faults(num_tasks: int) -> FaultState:
    """What a run remembers before its first step."""
    return FaultState(
        jnp.int32(0),
        jnp.zeros(num_tasks, jnp.int32),
        jnp.zeros(num_tasks, jnp.int32),
        jnp.int32(0),
        jnp.full((num_tasks, WINDOW), jnp.nan, jnp.float32),
    )


def must_skip(
    evaluation: Evaluation,
    gradient_norm: Float[Array, ""],
    kept: tuple[Any, Any],
    non_finite: NonFinite,
) -> Bool[Array, ""]:
    """Whether a step must leave parameters and all else as they were.

    It must where the gradient is not finite although the tasks at fault were left out
    of it, where an auxiliary loss, a collection or the memory of the aggregator is not,
    and where every labelled task is at fault.

    Args:
      evaluation: What the step learnt.
      gradient_norm: Norm of the gradient of all parameters.
      kept: Aggregator state and collections before the step.
      non_finite: What to do about a task at fault.
    """
    at_fault = jnp.any(evaluation.faulty)
    hopeless = at_fault if non_finite == "skip" else ~jnp.any(evaluation.active)
    sound = (
        jnp.isfinite(gradient_norm)
        & jnp.isfinite(evaluation.auxiliary_loss)
        & _stays_finite(kept, (evaluation.aggregator_state, evaluation.collections))
    )
    return ~sound | (at_fault & hopeless)


def _stays_finite(before: Any, after: Any) -> Bool[Array, ""]:
    """Whether no small array has an entry that is not finite any more."""
    sound = jnp.array(True)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(new.dtype, jnp.floating) and new.size <= SMALL:
            sound &= jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))
    return sound


def keep_if(condition: Bool[Array, ""], before: Tree, after: Tree) -> Tree:
    """``before`` where the condition holds, else ``after``: trees of like arrays."""
    return jax.tree.map(lambda old, new: jnp.where(condition, old, new), before, after)


def take_note(
    state: FaultState,
    evaluation: Evaluation,
    skipped: Bool[Array, ""],
    parameter_norm: Float[Array, ""],
) -> tuple[FaultState, Float[Array, "fields tasks"]]:
    """Remembers a step, and reports on it.

    Args:
      state: What there is to remember from the steps before.
      evaluation: What the step learnt.
      skipped: Whether it was skipped.
      parameter_norm: Norm of the parameters after it.

    Returns:
      The new memory, and a `FaultReport` stacked into one array.
    """
    losses, faulty = evaluation.losses, evaluation.faulty
    known = jnp.isfinite(state.recent)
    count = jnp.sum(known, axis=1).astype(jnp.float32)
    recent = jnp.where(known, state.recent, 0.0)
    mean = jnp.sum(recent, axis=1) / jnp.maximum(count, 1.0)
    squares = jnp.where(known, jnp.square(recent - mean[:, None]), 0.0)
    deviation = jnp.sqrt(jnp.sum(squares, axis=1) / jnp.maximum(count - 1.0, 1.0))
    deviation = jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(mean))
    limit = jnp.where(count >= FEWEST, mean + DEVIATIONS * deviation, jnp.inf)
    counts = evaluation.active & jnp.isfinite(losses)
    without_label = ~(evaluation.active | faulty)
    state = FaultState(
        jnp.where(skipped | jnp.any(faulty), state.in_a_row + 1, 0),
        jnp.where(
            without_label,
            state.task_in_a_row,
            jnp.where(faulty, state.task_in_a_row + 1, 0),
        ),
        state.left_out + faulty.astype(jnp.int32),
        state.skipped + skipped.astype(jnp.int32),
        jnp.where(
            counts[:, None],
            jnp.concatenate([state.recent[:, 1:], losses[:, None]], axis=1),
            state.recent,
        ),
    )
    report = FaultReport(
        loss=losses,
        faulty=faulty,
        skipped=skipped,
        in_a_row=state.in_a_row,
        task_in_a_row=state.task_in_a_row,
        left_out=state.left_out,
        skipped_steps=state.skipped,
        mean=mean,
        limit=limit,
        spike=counts & (losses > limit),
        finite=jnp.isfinite(parameter_norm),
    )
    return state, jnp.stack(
        [jnp.broadcast_to(row, losses.shape).astype(jnp.float32) for row in report]
    )
