"""A multitask model: a trunk, and a head for each task, as pure functions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

Params = Mapping[str, Any]
"""``{"trunk": ..., "heads": {task: ...}}``."""

SOWN = ("losses", "statistics")
"""Collections that a forward pass writes anew."""


def repeat(params: PyTree, times: int) -> PyTree:
    """``params`` with a new leading axis of ``times`` copies."""
    return jax.tree.map(lambda p: jnp.broadcast_to(p, (times, *p.shape)), params)


class TrunkOutput(NamedTuple):
    """What the forward passes of a trunk give.

    Attributes:
      features: Token features of each pass.
      auxiliary_loss: Sum of the routers' weighted auxiliary losses; 0 if dense.
      statistics: Layer name -> router statistics; empty if dense.
      collections: Other collections as each pass leaves them; empty if none changes.
    """

    features: Float[Array, "passes batch rows columns width"]
    auxiliary_loss: Float[Array, " passes"]
    statistics: Mapping[str, Any]
    collections: Mapping[str, Any]


def layer_statistics(sown: Mapping[str, Any], period: int) -> dict[str, Any]:
    """Router statistics by the name of the layer.

    The layer ``moe`` of a block has the block's name, any other layer's is appended.
    Blocks that ``jax.lax.scan`` repeats are counted on: the ``i``-th repetition of
    ``blocks/block_j`` is ``block_{i · period + j}``.

    Args:
      sown: Collection ``statistics``.
      period: Number of blocks that are repeated together.
    """
    found = {}

    def visit(tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
        if "load" in tree:
            found[path] = tree
            return
        for name, branch in tree.items():
            visit(branch, (*path, name))

    visit(sown, ())
    named = {}
    for path, statistics in found.items():
        layers = [part for part in path if part not in ("blocks", "moe")]
        if path[0] != "blocks":
            named["_".join(layers)] = statistics
            continue
        _, _, place = layers[0].partition("_")
        for i in range(statistics["load"].shape[0]):
            name = "_".join([f"block_{i * period + int(place)}", *layers[1:]])
            named[name] = jax.tree.map(lambda leaf, i=i: leaf[i], statistics)
    return named


@dataclasses.dataclass(frozen=True)
class MultitaskModel:
    """A trunk and one head a task; the seam between them is explicit.

    Attributes:
      trunk: Module ``(images, task, *, train) -> features``. If it has a field
        ``num_tasks`` that is not None, every task has a forward pass of its own.
      heads: Task name -> module from features to prediction, in the order of the
        tasks' indices.
    """

    trunk: nn.Module
    heads: Mapping[str, nn.Module]

    @property
    def task_conditioned(self) -> bool:
        """Whether the trunk computes other features for other tasks."""
        return getattr(self.trunk, "num_tasks", None) is not None

    def init(
        self, key: Key[Array, ""], inputs: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Params:
        """Fresh parameters, boxed with the names of their logical axes.

        Args:
          key: PRNG key.
          inputs: Task name -> shape and type of a batch of its inputs.

        Returns:
          The parameters of trunk and heads.
        """
        trunk_key, *head_keys = jax.random.split(key, 1 + len(self.heads))
        variables = self._init_trunk(trunk_key, inputs)
        trunk = variables["params"]
        collections = nn.unbox({k: v for k, v in variables.items() if k != "params"})
        images = {task: jnp.zeros(x.shape, x.dtype) for task, x in inputs.items()}
        heads = {}
        for (task, head), head_key in zip(self.heads.items(), head_keys, strict=True):
            features = jax.eval_shape(
                lambda trunk, task=task: (
                    self.apply_trunk(
                        repeat(trunk, 1),
                        images[task],
                        (task,),
                        train=False,
                        collections=collections,
                    ).features
                ),
                nn.unbox(trunk),
            )
            zeros = jnp.zeros(features.shape[1:], features.dtype)
            heads[task] = head.init(head_key, zeros)["params"]
        return {"trunk": trunk, "heads": heads}

    def init_collections(
        self, key: Key[Array, ""], inputs: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, Any]:
        """What the trunk keeps besides its parameters, at the start; mostly empty."""
        variables = self._init_trunk(key, inputs)
        return {
            name: collection
            for name, collection in variables.items()
            if name not in ("params", *SOWN)
        }

    def _init_trunk(
        self, key: Key[Array, ""], inputs: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, Any]:
        images = next(iter(inputs.values()))
        return self.trunk.init(
            key,
            jnp.zeros(images.shape, images.dtype),
            jnp.int32(0) if self.task_conditioned else None,
            train=False,
        )

    def task_index(self, task: str) -> int:
        """The place of a task among the heads, by which the trunk tells tasks apart.

        Raises:
          ValueError: If there is no such task.
        """
        tasks = list(self.heads)
        if task not in tasks:
            raise ValueError(
                f"task is {task!r}, but the model has heads for {tasks}; name one of "
                "them"
            )
        return tasks.index(task)

    def num_passes(self, tasks: Sequence[str]) -> int:
        """Forward passes of the trunk that ``tasks`` need: one, or one each."""
        return len(tasks) if self.task_conditioned else 1

    def apply_trunk(
        self,
        params: Params,
        inputs: Array,
        tasks: Sequence[str],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
        collections: Mapping[str, Any] | None = None,
    ) -> TrunkOutput:
        """The forward passes of the trunk that ``tasks`` need, one after another.

        Every pass has a copy of the parameters to itself, so that the gradient with
        respect to the copies is the gradient by task. The passes are a loop: it takes
        no longer to compile for more tasks.

        Args:
          params: Parameters of the trunk, with a leading axis over the passes.
          inputs: ``[batch, height, width, channels]``.
          tasks: Names of the tasks that the features are for.
          train: Whether routers are noisy.
          key: PRNG key of that noise.
          collections: What the trunk keeps besides its parameters. All passes begin
            with it, and change it if ``train``.

        Returns:
          Features, auxiliary loss, router statistics and collections, each with a
          leading axis over the passes.

        Raises:
          ValueError: If there is no such task.
        """
        indices = jnp.array(
            [self.task_index(task) for task in tasks][: self.num_passes(tasks)],
            jnp.int32,
        )

        def apply(arguments) -> TrunkOutput:
            params, index = arguments
            rngs = None if key is None else {"router": jax.random.fold_in(key, index)}
            kept = collections or {}
            features, written = self.trunk.apply(
                {"params": params, **kept},
                inputs,
                index if self.task_conditioned else None,
                train=train,
                rngs=rngs,
                mutable=[*SOWN, *(kept if train else ())],
            )
            losses: list[Array] = jax.tree.leaves(written.get("losses", {}))
            return TrunkOutput(
                features,
                sum((jnp.sum(loss) for loss in losses), start=jnp.float32(0.0)),
                layer_statistics(
                    written.get("statistics") or {}, getattr(self.trunk, "period", 1)
                ),
                {name: value for name, value in written.items() if name not in SOWN},
            )

        if len(indices) == 1:
            return jax.tree.map(
                lambda leaf: leaf[None],
                apply(jax.tree.map(lambda leaf: leaf[0], (params, indices))),
            )
        return jax.lax.map(apply, (params, indices))

    def apply_head(self, params: Params, features: Array, task: str) -> Array:
        """The prediction of ``task`` from trunk features.

        Args:
          params: Parameters of that task's head.
          features: ``[batch, rows, columns, width]``.
          task: Name of the task.

        Returns:
          The prediction.
        """
        return self.heads[task].apply({"params": params}, features)  # type: ignore[return-value]
