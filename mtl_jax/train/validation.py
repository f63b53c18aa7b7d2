"""The checks of an experiment that are made before it starts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
import optax

from mtl_jax.data.mixture import Component, Mixture
from mtl_jax.data.source import Record, Source
from mtl_jax.sharding import Rules
from mtl_jax.sharding.mesh import AXES
from mtl_jax.sharding.rules import check_rules
from mtl_jax.tasks.metrics import Metric
from mtl_jax.tasks.task import Task
from mtl_jax.train.experiment import Experiment, MeshShape
from mtl_jax.train.model_validation import (
    calling,
    check_heads,
    check_kind,
    check_trunk,
    host_memory,
)
from mtl_jax.train.start_from import check_growth
from mtl_jax.train.step import ROUTER_METRICS


def validate(experiment: Experiment, *, runs_here: bool = True) -> None:
    """Checks what can be checked without device time.

    Args:
      experiment: What is to be run.
      runs_here: Whether on this machine, whose memory must then hold a batch and whose
        devices the parameters.

    Raises:
      ValueError: If a field does not fit the others; the message names the field,
        its value and the remedy.
    """
    _check_kinds(experiment)
    _check_numbers(experiment)
    _check_names(experiment)
    _check_labels(experiment)
    _check_records(experiment)
    if runs_here:
        _check_host_memory(experiment)
    check_rules(experiment.rules, AXES)
    check_trunk(experiment)
    _check_factories(experiment)
    check_growth(experiment.initialize, experiment.trunk)
    check_heads(experiment, runs_here)


def _check_kinds(experiment: Experiment) -> None:
    if not isinstance(experiment, Experiment):
        raise ValueError(
            f"the config makes a {type(experiment).__name__}; it must make an "
            "mtl_jax.train.Experiment"
        )
    for name, kind in (
        ("tasks", Sequence),
        ("mixture", Mixture),
        ("trunk", nn.Module),
        ("mesh", MeshShape),
        ("rules", Rules),
    ):
        check_kind(name, getattr(experiment, name), kind)
    for index, task in enumerate(experiment.tasks):
        check_kind(f"tasks.{index}", task, Task)
        check_kind(f"tasks.{task.name}.head", task.head, nn.Module)
        check_kind(f"tasks.{task.name}.metrics", task.metrics, Sequence)
        for metric in task.metrics:
            check_kind(f"tasks.{task.name}.metrics", metric, Metric)
    components = experiment.mixture.components
    check_kind("mixture.components", components, Mapping)
    for name, component in components.items():
        check_kind(f"mixture.components.{name}", component, Component)
        check_kind(f"mixture.components.{name}.train", component.train, Source)
        check_kind(f"mixture.components.{name}.test", component.test, Source)


def _check_numbers(experiment: Experiment) -> None:
    for name in (
        "num_steps",
        "evaluate_every",
        "checkpoint_every",
        "checkpoints_kept",
        "log_every",
        "evaluation_batch_size",
        "evaluation_examples",
        "max_faulty_steps",
    ):
        value = getattr(experiment, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if experiment.num_steps >= 2**31:
        raise ValueError(
            f"num_steps is {experiment.num_steps}; it must be less than 2**31, as "
            "steps are counted in 32 bits"
        )
    if not 0 <= experiment.seed < 2**32:
        raise ValueError(f"seed is {experiment.seed}; it must be in [0, 2**32)")
    weight = experiment.mutual_information_weight
    if weight < 0:
        raise ValueError(
            f"mutual_information_weight is {weight}; it must be at least 0"
        )
    if weight and not experiment.model.task_conditioned:
        raise ValueError(
            f"mutual_information_weight is {weight}, but the trunk has no router a "
            "task, and so no experts by task; set trunk.num_tasks, or the weight to 0"
        )
    if experiment.gradients_at not in ("params", "features"):
        raise ValueError(
            f'gradients_at is {experiment.gradients_at!r}; use "params" or "features"'
        )
    if experiment.non_finite not in ("leave_out", "skip"):
        raise ValueError(
            f'non_finite is {experiment.non_finite!r}; use "leave_out" or "skip"'
        )


def _check_names(experiment: Experiment) -> None:
    names = [task.name for task in experiment.tasks]
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"tasks are {names}; give at least one, each with its own name"
        )
    for name in (*names, *experiment.mixture.components):
        # They are parts of the flat names in metrics and samples.
        if not name.strip() or "/" in name or name == "all" or not name.isprintable():
            raise ValueError(
                f"{name!r} is no name for a task or a mixture component; choose one "
                'that is neither empty nor "all", can be printed and has no "/"'
            )
    for task in experiment.tasks:
        metrics = [metric.name for metric in task.metrics]
        taken = {"loss", "test_loss", "gradient_norm", "weight", "left_out"}
        taken |= set(ROUTER_METRICS.values())
        if not metrics or len(set(metrics)) < len(metrics) or taken & set(metrics):
            raise ValueError(
                f"tasks.{task.name}.metrics are {metrics}; give at least one, each "
                f"with its own name, which is none of {sorted(taken)}"
            )


def _check_labels(experiment: Experiment) -> None:
    names = [task.name for task in experiment.tasks]
    for source, component in experiment.mixture.components.items():
        path = f"mixture.components.{source}"
        if not 0 <= component.weight < math.inf:
            raise ValueError(
                f"{path}.weight is {component.weight}; it must be finite and at least "
                "0, which leaves the source out of training"
            )
        if len(set(component.tasks)) < len(component.tasks):
            raise ValueError(f"{path}.tasks is {component.tasks}; name each task once")
    labelled = {task for tasks in experiment.labels.values() for task in tasks}
    for name in names:
        if name not in labelled:
            raise ValueError(
                f"task {name!r} has no labelled source; name it in the tasks of a "
                "mixture component with a positive weight, or leave the task out"
            )
    for source, component in experiment.mixture.components.items():
        unknown = set(component.tasks) - set(names)
        if unknown:
            raise ValueError(
                f"mixture component {source!r} labels unknown tasks {sorted(unknown)}; "
                f"the tasks are {names}"
            )
        if component.weight > 0 and not component.tasks:
            raise ValueError(
                f"mixture.components.{source}.tasks is empty; name the tasks that it "
                "labels, or set its weight to 0"
            )


def _check_records(experiment: Experiment) -> None:
    """Reads a record of each split: damage shows here rather than at a later step."""
    for source, component in experiment.mixture.components.items():
        readers = _readers(experiment, component)
        for split, records in (("train", component.train), ("test", component.test)):
            where = f"the {split} split of source {source!r}"
            if len(records) == 0:
                raise ValueError(
                    f"{where} is empty; leave the source out or give it records"
                )
            for field, reader in readers.items():
                if field not in records.fields:
                    raise ValueError(
                        f"{where} has no field {field!r}, which {reader} needs; its "
                        f"fields are {sorted(records.fields)}"
                    )
                if _described(records, field) != _described(component.train, field):
                    raise ValueError(
                        f"field {field!r} of source {source!r} differs between the "
                        f"splits: {records.fields[field]} in {split}, but "
                        f"{component.train.fields[field]} in train; make them alike"
                    )
            # A file that was cut off has its first records, but not its last.
            for index in (0, len(records) - 1):
                with calling(f"{where} cannot be read at record {index}"):
                    record = records[index]
                _check_record(where, records, record, readers)
        shape = component.train.fields[component.input_field].shape
        if len(shape) != 3:
            raise ValueError(
                f"mixture.components.{source}.input_field is "
                f"{component.input_field!r}, which has shape {shape}; an input has "
                "height, width and channels"
            )
        _check_augment(source, component, readers)


def _readers(experiment: Experiment, component: Component) -> dict[str, str]:
    """Field of a source's records -> what reads it."""
    fields = {task.name: task.field for task in experiment.tasks}
    return {component.input_field: "the input"} | {
        fields[task]: f"task {task!r}" for task in component.tasks
    }


def _check_host_memory(experiment: Experiment) -> None:
    smallest = []
    for component in experiment.mixture.components.values():
        read = _readers(experiment, component)
        sizes = (component.train.fields[field] for field in read)
        smallest.append(
            sum(math.prod(f.shape) * np.dtype(f.dtype).itemsize for f in sizes)
        )
    for name, batch_size in (
        ("mixture.batch_size", experiment.mixture.batch_size),
        ("evaluation_batch_size", experiment.evaluation_batch_size),
    ):
        needed, memory = batch_size * min(smallest), host_memory()
        if needed > memory:
            raise ValueError(
                f"{name} is {batch_size}; the records of such a batch take at least "
                f"{needed / 1e9:,.0f} GB and this machine has {memory / 1e9:,.0f} GB: "
                "make it smaller"
            )


def _described(records: Source, field: str) -> tuple:
    described = records.fields[field]
    return described.shape, described.dtype, described.num_classes


def _check_record(
    where: str, records: Source, record: Record, fields: Iterable[str]
) -> None:
    for field in fields:
        expected = records.fields[field]
        array = np.asarray(record[field]) if field in record else None
        if array is None or (array.shape, array.dtype) != (
            expected.shape,
            np.dtype(expected.dtype),
        ):
            found = "absent" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(
                f"{where}: field {field!r} of a record is {found}, but its fields say "
                f"{expected.dtype} {expected.shape}; make them agree"
            )


def _check_augment(source: str, component: Component, fields: Iterable[str]) -> None:
    if component.augment is None:
        return
    path = f"mixture.components.{source}.augment"
    rng = np.random.default_rng(0)
    # Several times, as it may do nothing once.
    for _ in range(8):
        try:
            record = component.augment(component.train[0], rng)
        except Exception as error:  # it may be anybody's function
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path} fails on a record of that source: {reason}"
            ) from error
        if not isinstance(record, Mapping):
            raise ValueError(f"{path} returned {record!r}; it must return a record")
        _check_record(f"after {path}", component.train, record, fields)


def _check_factories(experiment: Experiment) -> None:
    for name, argument, value, remedy in (
        (
            "aggregator",
            "num_tasks",
            len(experiment.tasks),
            "; clipping and the like belong behind it, in the optimizer: before it, "
            "they would bend the angles that it reasons about",
        ),
        ("optimizer", "num_steps", experiment.num_steps, ""),
    ):
        make = getattr(experiment, name)
        if argument in getattr(make, "keywords", {}):
            raise ValueError(
                f"{name}.{argument} is {make.keywords[argument]!r}; leave it out, as "
                f"the experiment gives {value}"
            )
        with calling(
            f"{name} cannot be called with {argument}",
            f"use fdl.Partial of a function that takes that{remedy}",
        ):
            made = make(**{argument: value})
        if name == "optimizer" and not isinstance(made, optax.GradientTransformation):
            raise ValueError(
                f"optimizer makes a {type(made).__name__}; it must make an "
                "optax.GradientTransformation"
            )
    for name in ("sharpness", "initialize"):
        value = getattr(experiment, name)
        if value is not None and not callable(value):
            raise ValueError(
                f"{name} is a {type(value).__name__}; use fdl.Partial of a function, "
                "or None"
            )
    if experiment.sharpness is not None:
        with calling(
            "sharpness cannot be called with a gradient function and ascent",
            "use fdl.Partial of a function that takes those, with all that it needs",
        ):
            experiment.sharpness(_no_gradients, ascent=_no_gradients)


def _no_gradients(*_: Any) -> Any:
    """Stands for a gradient function where nothing is computed yet."""
    raise ValueError("sharpness computes gradients where it should make a function")
