"""Two small multitask problems: arrays in memory, a trunk and a head a task."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from mtl_jax.data.sources import digits, earth, multi_digits
from mtl_jax.layers.patch import unpatchify
from mtl_jax.tasks import (
    Task,
    accuracy,
    huber,
    mean_absolute_error,
    softmax_cross_entropy,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A data set, its tasks and the network that learns them.

    Attributes:
      name: Name of the data set.
      tasks: What is learned; the first metric of each is reported.
      trunk: Module from images to features.
      splits: Split -> field -> array, for ``"train"``, ``"valid"`` and ``"test"``.
      batch_size: Examples a step.
      num_steps: Length of a run.
    """

    name: str
    tasks: tuple[Task, ...]
    trunk: nn.Module
    splits: Mapping[str, Mapping[str, Array]]
    batch_size: int
    num_steps: int

    def init(self, key: Array) -> dict[str, PyTree]:
        """New parameters, ``{"trunk": ..., "heads": {task: ...}}``."""
        image = self.splits["train"]["image"][:1]
        trunk_key, *head_keys = jax.random.split(key, len(self.tasks) + 1)
        features, trunk = self.trunk.init_with_output(trunk_key, image)
        heads = {
            task.name: task.head.init(head_key, features)
            for task, head_key in zip(self.tasks, head_keys, strict=True)
        }
        return {"trunk": trunk, "heads": heads}

    def features(self, trunk: PyTree, batch: Mapping[str, Array]) -> Array:
        """What the heads see."""
        return self.trunk.apply(trunk, batch["image"])

    @property
    def feature_losses(self) -> dict[str, Callable[..., Array]]:
        """Task name -> ``loss(features, head, batch)``."""

        def loss(features, head, batch, task):
            prediction = task.head.apply(head, features)
            values, labelled = task.loss(prediction, batch[task.name])
            return jnp.sum(values) / jnp.maximum(jnp.sum(labelled), 1).astype(float)

        return {task.name: functools.partial(loss, task=task) for task in self.tasks}

    @property
    def task_losses(self) -> dict[str, Callable[..., Array]]:
        """Task name -> ``loss(trunk, head, batch)``."""
        return {
            name: lambda trunk, head, batch, loss=loss: loss(
                self.features(trunk, batch), head, batch
            )
            for name, loss in self.feature_losses.items()
        }

    def losses(
        self, params: Mapping[str, PyTree], batch: Mapping[str, Array]
    ) -> Float[Array, " tasks"]:
        """All losses from one pass of the trunk."""
        features = self.features(params["trunk"], batch)
        return jnp.stack(
            [
                loss(features, params["heads"][name], batch)
                for name, loss in self.feature_losses.items()
            ]
        )


def unfolded_convolution(
    images: Array, kernel: Array, strides: Sequence[int], padding: str, **_: Any
) -> Array:
    """A convolution as one matrix product: in a loop on a CPU XLA's own is slow."""
    rows, columns = kernel.shape[:2]
    sizes = images.shape[1:3]
    pads = jax.lax.padtype_to_pads(sizes, kernel.shape[:2], strides, padding)
    images = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    last_row, last_column = (
        images.shape[axis + 1] - kernel.shape[axis] + 1 for axis in (0, 1)
    )
    shifted = [
        images[:, i : i + last_row : strides[0], j : j + last_column : strides[1]]
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])


class Trunk(nn.Module):
    """Two strided convolutions, and a dense layer over the whole image if asked for."""

    hidden: int | None = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        conv = functools.partial(
            nn.Conv, strides=2, conv_general_dilated=unfolded_convolution
        )
        x = nn.relu(conv(16, (5, 5))(x))
        x = nn.relu(conv(32, (3, 3))(x))
        if self.hidden is None:
            return x
        return nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))


class PixelHead(nn.Module):
    """Class logits, or one value, for each of the 4 x 4 pixels of a position."""

    num_classes: int | None = None

    @nn.compact
    def __call__(self, features: Array) -> Array:
        pixels = unpatchify(nn.Dense(16 * (self.num_classes or 1))(features), 4)
        return pixels if self.num_classes else pixels[..., 0]


def multi_mnist() -> Problem:
    """Two overlapping digits; the validation pairs are made of digits set apart."""
    images, labels = digits.load_digits("train")

    def pairs(start: int, stop: int, count: int) -> dict[str, np.ndarray]:
        draws = np.random.default_rng(0).integers(start, stop, (2, count))
        left, right = images[draws, ..., 0]
        canvas = multi_digits.overlay(left, right)
        image = multi_digits.shrink(canvas)[..., None]
        return {"image": image, "left": labels[draws[0]], "right": labels[draws[1]]}

    test = multi_digits.MultiDigits("test")
    splits = {
        "train": pairs(0, 7000, 14_000),
        "valid": pairs(7000, 8000, 2_000),
        "test": stack(test[index] for index in range(len(test))),
    }
    tasks = tuple(
        Task(name, nn.Dense(10), softmax_cross_entropy, (accuracy(),))
        for name in ("left", "right")
    )
    arrays = jax.tree.map(jnp.asarray, splits)
    return Problem("multi_mnist", tasks, Trunk(64), arrays, 64, 400)


def earth_tiles() -> Problem:
    """Four dense tasks; the validation tiles lie in blocks of the globe set apart."""

    def is_validation(block: tuple[int, int]) -> bool:
        return (block[1] + 7 * block[0]) % 12 == 8

    def blocks(origin: tuple[int, int], margin: int) -> list[bool]:
        return [is_validation(b) for b in earth.blocks_of(*origin, margin=margin)]

    train, test = earth.Earth("train"), earth.Earth("test")
    origins = list(enumerate(earth.tile_origins("train")))
    splits = {
        "train": stack(train[i] for i, at in origins if not any(blocks(at, 1))),
        "valid": stack(train[i] for i, at in origins if all(blocks(at, 0))),
        "test": stack(test[index] for index in range(len(test))),
    }
    classes = (softmax_cross_entropy, (accuracy(),))
    values = (huber, (mean_absolute_error(),))
    tasks = (
        Task("surface", PixelHead(2), *classes),
        Task("climate", PixelHead(5), *classes),
        Task("elevation", PixelHead(), *values),
        Task("log_slope", PixelHead(), *values),
    )
    arrays = jax.tree.map(jnp.asarray, splits)
    return Problem("earth", tasks, Trunk(), arrays, 32, 300)


def stack(records: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Records as arrays with a leading axis."""
    records = list(records)
    return {name: np.stack([r[name] for r in records]) for name in records[0]}
