"""The objective: what each task loses on a batch of several sources."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mtl_jax.data.batch import Batch, Examples
from mtl_jax.layers.moe.losses import mutual_information
from mtl_jax.models.multitask import MultitaskModel, TrunkOutput, repeat
from mtl_jax.tasks.metrics import element_mask
from mtl_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses of several tasks on batches of several sources.

    A task's loss is the mean over all its labelled elements in the global batch,
    whichever sources and devices they are on.

    Attributes:
      model: Trunk and heads.
      tasks: The tasks, in the order of their indices.
      labels: Source name -> names of the tasks that it labels.
      mutual_information_weight: Weight of Mod-Squad's loss on the gates of every layer
        of experts under all tasks of a step; 0 for none.
    """

    model: MultitaskModel
    tasks: tuple[Task, ...]
    labels: Mapping[str, tuple[str, ...]]
    mutual_information_weight: float = 0.0

    def label_counts(self, batch: Batch) -> Float[Array, " tasks"]:
        """Number of labelled elements of each task in the global batch."""
        counts = {task.name: jnp.float32(0.0) for task in self.tasks}
        for source, names in self.labels.items():
            examples = batch[source]
            for name in names:
                keep = element_mask(examples.mask[name], examples.targets[name])
                counts[name] += jnp.sum(keep, dtype=jnp.float32)
        return jnp.stack(list(counts.values()))

    def task_loss(
        self,
        head_params: Mapping,
        features: Float[Array, "batch rows columns width"],
        examples: Examples,
        task: Task,
        count: Float[Array, ""],
    ) -> Float[Array, ""]:
        """One source's share of one task's loss.

        Args:
          head_params: Parameters of the task's head.
          features: Trunk features of the source's examples.
          examples: Those examples.
          task: The task.
          count: The task's labelled elements in the global batch, over all sources.

        Returns:
          Sum of the losses of this source's labelled elements, over ``count``.
        """
        prediction = self.model.apply_head(head_params, features, task.name)
        values, valid = task.loss(prediction, examples.targets[task.name])
        mask = examples.mask[task.name]
        keep = valid & mask.reshape(mask.shape + (1,) * (valid.ndim - 1))
        total = jnp.sum(jnp.where(keep, values, 0.0), dtype=jnp.float32)
        return total / jnp.maximum(count, 1.0)

    def joint_gates(self, output: TrunkOutput) -> Mapping[str, Array]:
        """Mean gates ``[passes, experts]`` of each layer that `joint_loss` looks at."""
        if not self.mutual_information_weight:
            return {}
        return {name: layer["gates"] for name, layer in output.statistics.items()}

    def joint_loss(
        self,
        gates: Mapping[str, Mapping[str, Array]],
        num_tokens: Mapping[str, int],
    ) -> Float[Array, ""]:
        """The weighted loss that spans all tasks of a step (Mod-Squad).

        Args:
          gates: Source name -> layer name -> mean gates of the source's passes.
          num_tokens: Source name -> tokens of one pass.

        Returns:
          The sum over layers; 0 where its weight is.
        """
        names = [task.name for task in self.tasks]
        layers = next(iter(gates.values()), {})
        total = jnp.float32(0.0)
        for layer in layers:
            sums: dict[str, Array] = {name: jnp.float32(0.0) for name in names}
            tokens: dict[str, int] = dict.fromkeys(names, 0)
            for source, by_layer in gates.items():
                for j, name in enumerate(self.labels[source]):
                    sums[name] = sums[name] + num_tokens[source] * by_layer[layer][j]
                    tokens[name] += num_tokens[source]
            mean = jnp.stack([sums[name] / tokens[name] for name in names])
            seen = jnp.array([tokens[name] for name in names], jnp.float32)
            total += mutual_information(mean, seen)
        return self.mutual_information_weight * total

    def losses(
        self,
        params: Mapping,
        batch: Batch,
        key: Key[Array, ""],
        collections: Mapping | None = None,
    ) -> tuple[Float[Array, " tasks"], Float[Array, ""]]:
        """The loss of every task, and the sum of the auxiliary losses.

        Args:
          params: ``{"trunk", "heads"}``.
          batch: The global batch.
          key: PRNG key of the step.
          collections: What the trunk keeps besides its parameters.

        Returns:
          Losses in the order of the tasks, and the routers' auxiliary losses added up.
        """
        counts = dict(
            zip((t.name for t in self.tasks), self.label_counts(batch), strict=True)
        )
        by_name = {task.name: task for task in self.tasks}
        losses = {task.name: jnp.float32(0.0) for task in self.tasks}
        auxiliary = jnp.float32(0.0)
        gates, num_tokens = {}, {}
        for i, (source, names) in enumerate(self.labels.items()):
            passes = self.model.num_passes(names)
            output = self.model.apply_trunk(
                repeat(params["trunk"], passes),
                batch[source].inputs,
                names,
                train=True,
                key=jax.random.fold_in(key, i),
                collections=collections,
            )
            auxiliary += jnp.sum(output.auxiliary_loss)
            gates[source] = self.joint_gates(output)
            num_tokens[source] = tokens_of_a_pass(output)
            for j, name in enumerate(names):
                losses[name] += self.task_loss(
                    params["heads"][name],
                    output.features[j % passes],
                    batch[source],
                    by_name[name],
                    counts[name],
                )
        auxiliary += self.joint_loss(gates, num_tokens)
        return jnp.stack(list(losses.values())), auxiliary

    def summed_loss(
        self,
        params: Mapping,
        batch: Batch,
        key: Key[Array, ""],
        collections: Mapping | None = None,
    ) -> Float[Array, ""]:
        """The plain sum of all task losses and auxiliary losses.

        Args:
          params: ``{"trunk", "heads"}``.
          batch: The global batch.
          key: PRNG key of the step.
          collections: What the trunk keeps besides its parameters.

        Returns:
          The scalar that training by a plain sum minimises.
        """
        losses, auxiliary = self.losses(params, batch, key, collections)
        return jnp.sum(losses) + auxiliary


def tokens_of_a_pass(output: TrunkOutput) -> int:
    """Tokens of a source's examples, of which every pass sees all."""
    return math.prod(output.features.shape[1:4])
