"""The experiment: all that defines a run."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mtl_jax.data.mixture import Mixture
from mtl_jax.models.multitask import MultitaskModel
from mtl_jax.optim import Aggregator, Balancer
from mtl_jax.sharding import Rules
from mtl_jax.tasks.task import Task
from mtl_jax.train.faults import NonFinite


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
      initialize: From fresh parameters ``{"trunk": ..., "heads": ...}`` to those that
        the run starts from, of the same shapes and types, such as a partial
        `mtl_jax.models.pretrained.warm_start`; None for the fresh ones. It is called
        with arrays, on the devices, once a run, and not where a run continues from a
        checkpoint; and before that, to check it, under `jax.eval_shape`.
      mutual_information_weight: Weight of Mod-Squad's loss, which keeps tasks to few
        experts and all experts in use (Chen et al., 2023), for each layer of experts;
        needs a router a task.
      non_finite: What a step does about a task whose loss or gradient is not finite:
        ``leave_out`` goes on without it, as if it had no labels in that step; ``skip``
        changes nothing in that step.
      max_faulty_steps: The run stops after so many steps in a row in which a task was
        left out or that were skipped, and after so many in a row of the steps with
        labels of one task that found it at fault; 1 stops at the first.
      mesh: Shape of the device mesh.
      rules: Which mesh axes each logical axis of the parameters is sharded over.
      seed: Seed of parameters, data order and every other random choice.
      evaluate_every: Updates between evaluations on test data.
      checkpoint_every: Updates between checkpoints.
      checkpoints_kept: How many of the newest checkpoints to keep; with 1 there is
        none to go back to where that is damaged.
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
    initialize: Callable | None = None
    mutual_information_weight: float = 0.0
    non_finite: NonFinite = "leave_out"
    max_faulty_steps: int = 10
    mesh: MeshShape = MeshShape()
    rules: Rules = Rules()  # noqa: RUF009, as it is frozen
    seed: int = 0
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    checkpoints_kept: int = 2
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
        mixtures = moe if isinstance(moe, tuple) else (moe,)
        return math.lcm(*(make().group_size for make in mixtures if make is not None))
