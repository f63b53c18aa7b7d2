"""Metrics as sums: additive over batches and devices, one number at the end."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mtl_jax.tasks.losses import labelled

Sums = Mapping[str, np.ndarray]
"""Named sums over the labelled elements; added up over batches in float64."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number that judges a task's predictions.

    Attributes:
      name: What it is called, such as ``"accuracy"``.
      higher_is_better: The sign convention, which delta-m needs.
      update: Pure function of a batch's predictions, targets and example mask
        (``[batch]`` bool) to a dict of sums; runs under `jax.jit`.
      compute: The metric from those sums; runs in NumPy.
      constant_predictor: The metric of the best constant prediction, from the same
        sums, or None where the sums do not tell it.
    """

    name: str
    higher_is_better: bool
    update: Callable[[Array, Array, Bool[Array, " batch"]], dict[str, Array]]
    compute: Callable[[Sums], float]
    constant_predictor: Callable[[Sums], float] | None = None


def element_mask(mask: Bool[Array, " batch"], target: Array) -> Array:
    """The labelled elements of the examples that ``mask`` keeps, shaped as target."""
    return labelled(target) & mask.reshape(mask.shape + (1,) * (target.ndim - 1))


def accuracy() -> Metric:
    """Fraction of labelled elements whose largest logit is the true class."""

    def update(prediction, target, mask):
        keep = element_mask(mask, target)
        classes = jax.nn.one_hot(target, prediction.shape[-1], dtype=jnp.float32)
        counts = jnp.where(keep[..., None], classes, 0.0)
        correct = keep & (jnp.argmax(prediction, axis=-1) == target)
        return {
            "correct": jnp.sum(correct, dtype=jnp.float32),
            "class_counts": jnp.sum(counts, axis=tuple(range(counts.ndim - 1))),
        }

    return Metric(
        "accuracy",
        higher_is_better=True,
        update=update,
        compute=lambda sums: float(sums["correct"] / np.sum(sums["class_counts"])),
        constant_predictor=lambda sums: float(
            np.max(sums["class_counts"]) / np.sum(sums["class_counts"])
        ),
    )


def mean_iou() -> Metric:
    """Intersection over union, averaged over the classes that occur in the targets."""

    def update(prediction, target, mask):
        num_classes = prediction.shape[-1]
        keep = element_mask(mask, target)[..., None]
        truth = jax.nn.one_hot(target, num_classes, dtype=jnp.float32)
        guess = jax.nn.one_hot(
            jnp.argmax(prediction, axis=-1), num_classes, dtype=jnp.float32
        )
        truth, guess = jnp.where(keep, truth, 0.0), jnp.where(keep, guess, 0.0)
        return {"confusion": jnp.einsum("...t,...g->tg", truth, guess)}

    def mean_over_classes(confusion: np.ndarray) -> float:
        intersection = np.diag(confusion)
        union = confusion.sum(0) + confusion.sum(1) - intersection
        present = confusion.sum(1) > 0
        return float(np.mean(intersection[present] / union[present]))

    def constant_predictor(sums: Sums) -> float:
        counts = sums["confusion"].sum(1)
        confusion = np.zeros_like(sums["confusion"])
        confusion[:, np.argmax(counts)] = counts
        return mean_over_classes(confusion)

    return Metric(
        "mean_iou",
        higher_is_better=True,
        update=update,
        compute=lambda sums: mean_over_classes(sums["confusion"]),
        constant_predictor=constant_predictor,
    )


def _errors(prediction: Array, target: Array, mask: Array) -> tuple[Array, ...]:
    """Which elements count, and their targets and errors in float32, 0 elsewhere."""
    keep = element_mask(mask, target)
    target = jnp.where(keep, target, 0.0).astype(jnp.float32)
    return keep, target, jnp.where(keep, prediction.astype(jnp.float32) - target, 0.0)


def r2() -> Metric:
    """Coefficient of determination: 1 - squared error / variance of the targets."""

    def update(prediction, target, mask):
        keep, target, error = _errors(prediction, target, mask)
        return {
            "count": jnp.sum(keep, dtype=jnp.float32),
            "target": jnp.sum(target),
            "target_squared": jnp.sum(jnp.square(target)),
            "error_squared": jnp.sum(jnp.square(error)),
        }

    def compute(sums: Sums) -> float:
        total = sums["target_squared"] - sums["target"] ** 2 / sums["count"]
        return float(1.0 - sums["error_squared"] / total)

    return Metric(
        "r2",
        higher_is_better=True,
        update=update,
        compute=compute,
        constant_predictor=lambda sums: 0.0,
    )


def mean_absolute_error() -> Metric:
    """Mean absolute difference over the labelled elements, in units of the target."""

    def update(prediction, target, mask):
        keep, _, error = _errors(prediction, target, mask)
        return {
            "count": jnp.sum(keep, dtype=jnp.float32),
            "absolute_error": jnp.sum(jnp.abs(error)),
        }

    return Metric(
        "mean_absolute_error",
        higher_is_better=False,
        update=update,
        compute=lambda sums: float(sums["absolute_error"] / sums["count"]),
    )
