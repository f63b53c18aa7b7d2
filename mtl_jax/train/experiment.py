"""The experiment: all that defines a run, and the checks made before it starts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mtl_jax.data.mixture import Mixture
from mtl_jax.models.multitask import MultitaskModel, repeat
from mtl_jax.optim import Aggregator, Balancer
from mtl_jax.sharding import Rules
from mtl_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices each mesh axis spans; at most one is -1 and takes the rest.

    A single device makes a mesh of ones, whatever is asked for, so that a config
    written for many devices runs on a laptop.

    Attributes:
      data: Examples.
      fsdp: Examples, and the parameters' ``embed`` axis.
      expert: Examples, and experts.
      model: Hidden units and attention heads.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Tasks, a mixture of data, a model, an optimizer and a mesh.

    Attributes:
      tasks: What to predict; their order is the order of task indices.
      mixture: The data sets and which tasks they label.
      trunk: Flax module from images to token features.
      aggregator: Called with the number of tasks; makes an aggregator, which turns
        task gradients into one, or a balancer, which weighs losses and needs no task
        gradients.
      optimizer: Called with the number of steps; the Optax chain behind the
        aggregator.
      num_steps: Updates in the run.
      gradients_at: Where task gradients are taken: at the trunk's ``params`` (exact)
        or at its ``features`` (as cheap as a plain sum; shared trunks only). Balancers
        have no use for it.
      sharpness: Wraps the gradient function, such as a partial
        `mtl_jax.optim.sharpness_aware`; None for plain gradients.
      mesh: Shape of the device mesh.
      rules: Which mesh axes each logical axis of the parameters is sharded over.
      seed: Seed of parameters, data order and every other random choice.
      evaluate_every: Updates between evaluations on test data.
      checkpoint_every: Updates between checkpoints.
      log_every: Updates between lines of metrics.
      evaluation_batch_size: Examples in an evaluation batch.
      evaluation_examples: Test records of each source that evaluations *during*
        training use; the last evaluation uses all.
    """

    tasks: tuple[Task, ...]
    mixture: Mixture
    trunk: nn.Module
    aggregator: Callable[..., Aggregator | Balancer]
    optimizer: Callable[..., optax.GradientTransformation]
    num_steps: int
    gradients_at: Literal["params", "features"] = "params"
    sharpness: Callable | None = None
    mesh: MeshShape = MeshShape()
    rules: Rules = Rules()  # noqa: RUF009, as it is frozen
    seed: int = 0
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 10
    evaluation_batch_size: int = 64
    evaluation_examples: int | None = None

    @property
    def model(self) -> MultitaskModel:
        """The trunk with a head for each task."""
        return MultitaskModel(self.trunk, {task.name: task.head for task in self.tasks})

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """Source name -> tasks it labels, for the sources that are trained on."""
        return {
            name: component.tasks
            for name, component in self.mixture.components.items()
            if component.weight > 0 and component.tasks
        }

    @property
    def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Task name -> a batch of one of the inputs that it is computed from."""
        shapes = {}
        for name, tasks in self.labels.items():
            component = self.mixture.components[name]
            field = component.train.fields[component.input_field]
            for task in tasks:
                shapes[task] = jax.ShapeDtypeStruct(
                    (self._init_batch, *field.shape), jnp.dtype(field.dtype)
                )
        return shapes

    @property
    def _init_batch(self) -> int:
        """Smallest batch that the trunk takes: one routing group."""
        return self.group_size

    @property
    def group_size(self) -> int:
        """Examples that share a router's capacity; 1 in a dense trunk."""
        moe = getattr(self.trunk, "moe", None)
        return 1 if moe is None else moe().group_size


def validate(experiment: Experiment) -> None:
    """Checks what can be checked without device time.

    Args:
      experiment: What is to be run.

    Raises:
      ValueError: If a field does not fit the others; the message names the field,
        its value and the remedy.
    """
    _check_numbers(experiment)
    _check_labels(experiment)
    _check_trunk(experiment)
    _check_heads(experiment)


def _check_numbers(experiment: Experiment) -> None:
    for name in (
        "num_steps",
        "evaluate_every",
        "checkpoint_every",
        "log_every",
        "evaluation_batch_size",
        "evaluation_examples",
    ):
        value = getattr(experiment, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= experiment.seed < 2**32:
        raise ValueError(f"seed is {experiment.seed}; it must be in [0, 2**32)")
    if experiment.gradients_at not in ("params", "features"):
        raise ValueError(
            f'gradients_at is {experiment.gradients_at!r}; use "params" or "features"'
        )


def _check_labels(experiment: Experiment) -> None:
    names = [task.name for task in experiment.tasks]
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"tasks are {names}; give at least one, each with its own name"
        )
    labelled = {task for tasks in experiment.labels.values() for task in tasks}
    for task in experiment.tasks:
        if task.name not in labelled:
            raise ValueError(
                f"task {task.name!r} has no labelled source; name it in the tasks of a "
                "mixture component with a positive weight, or leave the task out"
            )
    for source, component in experiment.mixture.components.items():
        unknown = set(component.tasks) - set(names)
        if unknown:
            raise ValueError(
                f"mixture component {source!r} labels unknown tasks {sorted(unknown)}; "
                f"the tasks are {names}"
            )
        for split, records in (("train", component.train), ("test", component.test)):
            if len(records) == 0:
                raise ValueError(
                    f"the {split} split of source {source!r} is empty; leave the "
                    "source out or give it records"
                )
            # Damaged files show here rather than at the first step.
            records[0]
            needed = {t.name: t.field for t in experiment.tasks}
            for task in component.tasks:
                _check_field(source, split, records, needed[task], f"task {task!r}")
            _check_field(source, split, records, component.input_field, "the input")


def _check_field(source: str, split: str, records, field: str, reader: str) -> None:
    if field not in records.fields:
        raise ValueError(
            f"the {split} split of source {source!r} has no field {field!r}, which "
            f"{reader} needs; its fields are {sorted(records.fields)}"
        )


def _check_trunk(experiment: Experiment) -> None:
    num_routers = getattr(experiment.trunk, "num_tasks", None)
    if num_routers is not None and num_routers != len(experiment.tasks):
        raise ValueError(
            f"trunk.num_tasks is {num_routers}, but there are "
            f"{len(experiment.tasks)} tasks; make them equal, or use None for a "
            "trunk that the tasks share"
        )
    if experiment.group_size < 1:
        raise ValueError(
            f"trunk.moe.group_size is {experiment.group_size}; it must be at least 1"
        )
    if experiment.evaluation_batch_size % experiment.group_size:
        raise ValueError(
            f"evaluation_batch_size is {experiment.evaluation_batch_size}; it must be "
            f"a multiple of the routing group of {experiment.group_size} examples"
        )


def _check_heads(experiment: Experiment) -> None:
    """Compares the shape of every prediction with the labels it is to be judged by."""
    model, key = experiment.model, jax.random.key(0)
    try:
        params = nn.unbox(
            jax.eval_shape(lambda key: model.init(key, experiment.inputs), key)
        )
    except (ArithmeticError, TypeError) as error:
        # What layers raise for sizes of 0 or less, and for unknown dtypes.
        raise ValueError(
            f"the trunk or a head cannot be built ({error}); its sizes must be at "
            "least 1 and its dtype one that JAX has"
        ) from error
    for task in experiment.tasks:
        for source, tasks in experiment.labels.items():
            if task.name not in tasks:
                continue
            component = experiment.mixture.components[source]
            image = component.train.fields[component.input_field]
            label = component.train.fields[task.field]
            prediction = jax.eval_shape(
                lambda params, images, name=task.name: model.apply_head(
                    params["heads"][name],
                    model.apply_trunk(
                        repeat(params["trunk"], 1), images, (name,), train=False
                    ).features[0],
                    name,
                ),
                params,
                jax.ShapeDtypeStruct(
                    (experiment.group_size, *image.shape), jnp.dtype(image.dtype)
                ),
            ).shape[1:]
            expected = label.shape
            if label.num_classes is not None:
                expected = (*expected, label.num_classes)
            if prediction != expected:
                raise ValueError(
                    f"the head of task {task.name!r} predicts shape {prediction} for "
                    f"each example, but the labels of source {source!r} need "
                    f"{expected}; change the head's num_classes or patch_size"
                )
