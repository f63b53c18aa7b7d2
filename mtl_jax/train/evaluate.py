"""Evaluation of every task on the test records of every source that labels it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.data.batch import Examples
from mtl_jax.data.mixture import evaluation_batches
from mtl_jax.models.multitask import repeat
from mtl_jax.tasks.metrics import element_mask
from mtl_jax.train.objective import Objective
from mtl_jax.train.program import Program

Evaluate = Callable[..., dict[str, dict[str, Any]]]


class CutShortError(Exception):
    """An evaluation was given up before its end."""


def make_predict(objective: Objective, source: str) -> Callable:
    """A function ``(params, inputs) -> {task: prediction}`` for one source's tasks."""
    model, names = objective.model, objective.labels[source]
    passes = model.num_passes(names)

    def predict(params: Mapping, inputs: jax.Array) -> dict[str, jax.Array]:
        output = model.apply_trunk(
            repeat(params["trunk"], passes),
            inputs,
            names,
            train=False,
            collections=params.get("collections"),
        )
        return {
            name: model.apply_head(
                params["heads"][name], output.features[j % passes], name
            )
            for j, name in enumerate(names)
        }

    return predict


def make_evaluate(program: Program) -> Evaluate:
    """Compiles the evaluation of a model.

    Args:
      program: What is trained, and on which devices.

    Returns:
      A function of the parameters, the number of test records of each source to use
      (None for all) and, optionally, what to ask between batches whether to raise
      `CutShortError`; to ``{task: {"loss": value, metric: value, ...,
      "constant_predictor": {metric: value}}}``, the same in all processes.
    """
    objective, experiment = program.objective, program.experiment
    tasks = {task.name: task for task in objective.tasks}
    fields = {task.name: task.field for task in objective.tasks}

    def add_up(predict: Callable, params: Mapping, examples: Examples) -> dict:
        result = {}
        for name, prediction in predict(params, examples.inputs).items():
            target, mask = examples.targets[name], examples.mask[name]
            values, _ = tasks[name].loss(prediction, target)
            keep = element_mask(mask, target)
            result[name] = {
                "loss": {
                    "total": jnp.sum(jnp.where(keep, values, 0.0)),
                    "count": jnp.sum(keep, dtype=jnp.float32),
                }
            } | {
                metric.name: metric.update(prediction, target, mask)
                for metric in tasks[name].metrics
            }
        return result

    compiled = {
        source: jax.jit(
            functools.partial(add_up, make_predict(objective, source)),
            out_shardings=program.replicated,
        )
        for source in objective.labels
    }

    def evaluate(
        params: Mapping,
        num_examples: int | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ):
        totals: dict[str, Any] = {}
        for source, function in compiled.items():
            component = experiment.mixture.components[source]
            source_fields = {task: fields[task] for task in component.tasks}
            for examples in evaluation_batches(
                component,
                source_fields,
                experiment.evaluation_batch_size,
                num_examples,
                program.local_rows,
            ):
                if interrupted():
                    raise CutShortError
                with program.scope():
                    sums = function(params, program.place(examples))
                parts = jax.device_get(sums)
                for task, part in parts.items():
                    part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
                    totals[task] = (
                        jax.tree.map(np.add, totals[task], part)
                        if task in totals
                        else part
                    )
        return {name: _scores(tasks[name], totals[name]) for name in tasks}

    return evaluate


def _scores(task, totals: Mapping) -> dict[str, Any]:
    scores: dict[str, Any] = {
        "loss": float(totals["loss"]["total"] / totals["loss"]["count"])
    }
    constant = {}
    for metric in task.metrics:
        scores[metric.name] = metric.compute(totals[metric.name])
        constant[metric.name] = (
            None
            if metric.constant_predictor is None
            else metric.constant_predictor(totals[metric.name])
        )
    return scores | {"constant_predictor": constant}
