"""Test examples: dense predictions beside the truth, and misclassified images."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex, to_rgb

from mtl_jax.report.curves import PALETTE
from mtl_jax.report.images import Image, pixel_image
from mtl_jax.report.results import format_value
from mtl_jax.report.run_folder import Run

UNLABELLED = "#b3b3b3"
VALUE_COLORMAP = "viridis"
MAX_TILES = 12
MAX_MISTAKES = 48


@dataclasses.dataclass(frozen=True)
class Tile:
    """One test example of one dense task.

    Attributes:
      image: The input.
      target: The truth in colours, unlabelled pixels grey.
      prediction: The prediction in the same colours.
    """

    image: Image
    target: Image
    prediction: Image


@dataclasses.dataclass(frozen=True)
class DenseTask:
    """Test examples of one dense task on one source.

    Attributes:
      task: Task name.
      source: Source name.
      tiles: The examples.
      legend: Colour and name of each class; empty for values.
      scale: The colour bar of values; None for classes.
      low: The value at the bar's left end, as text; empty for classes.
      high: The value at its right end.
      has_unlabelled: Whether any shown pixel carries no label.
    """

    task: str
    source: str
    tiles: tuple[Tile, ...]
    legend: tuple[tuple[str, str], ...]
    scale: Image | None
    low: str
    high: str
    has_unlabelled: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was predicted for one task of one image.

    Attributes:
      task: Task name.
      target: The truth as text.
      prediction: The prediction as text.
      wrong: Whether a class was missed.
    """

    task: str
    target: str
    prediction: str
    wrong: bool


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Test examples of a source whose tasks label whole images.

    Attributes:
      source: Source name.
      examples: Each image with its verdicts, one a task.
      misclassified: Whether every example has a wrong class.
    """

    source: str
    examples: tuple[tuple[Image, tuple[Verdict, ...]], ...]
    misclassified: bool


def dense_tasks(run: Run) -> list[DenseTask]:
    """The kept test examples of every dense task.

    Args:
      run: A run with or without samples.

    Returns:
      One entry per source and dense task that has samples.

    Raises:
      ValueError: If an array of ``samples.npz`` doesn't fit its task.
    """
    return [
        _dense_task(run, source, task)
        for source, task in _sampled(run)
        if _output(run, task).get("dense")
    ]


def labelled_images(run: Run) -> list[LabelledImages]:
    """The kept test examples of every source whose tasks label whole images.

    Args:
      run: A run with or without samples.

    Returns:
      One entry per source with such tasks and at least one sample.

    Raises:
      ValueError: If an array of ``samples.npz`` doesn't fit its task.
    """
    by_source: dict[str, list[str]] = {}
    for source, task in _sampled(run):
        if not _output(run, task).get("dense"):
            by_source.setdefault(source, []).append(task)
    found = [
        _labelled_images(run, source, tasks) for source, tasks in by_source.items()
    ]
    return [entry for entry in found if entry.examples]


def class_colors(num_classes: int) -> list[str]:
    """Distinguishable colours, none of them the grey of unlabelled pixels.

    Args:
      num_classes: How many colours.

    Returns:
      Hexadecimal colours; beyond the palette's length they follow a colour map.
    """
    if num_classes <= len(PALETTE):
        return list(PALETTE[:num_classes])
    colormap = matplotlib.colormaps[VALUE_COLORMAP]
    return [to_hex(colormap(index / (num_classes - 1))) for index in range(num_classes)]


def class_pixels(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Colours integer classes.

    Args:
      classes: int ``[height, width]``, -1 where unlabelled.
      num_classes: Number of classes.

    Returns:
      uint8 ``[height, width, 3]``.
    """
    colors = [*class_colors(num_classes), UNLABELLED]
    table = np.array([to_rgb(color) for color in colors])
    index = np.where((classes < 0) | (classes >= num_classes), num_classes, classes)
    return np.round(255 * table[index]).astype(np.uint8)


def value_pixels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colours values on a fixed scale.

    Args:
      values: float ``[height, width]``, NaN where unlabelled.
      low: The value of the first colour; smaller values take it too.
      high: The value of the last colour; larger values take it too.

    Returns:
      uint8 ``[height, width, 3]``.
    """
    scaled = (values - low) / max(high - low, 1e-12)
    colored = matplotlib.colormaps[VALUE_COLORMAP](np.nan_to_num(scaled).clip(0, 1))
    unlabelled = np.isnan(values)[..., None]
    rgb = np.where(unlabelled, to_rgb(UNLABELLED), colored[..., :3])
    return np.round(255 * rgb).astype(np.uint8)


def _sampled(run: Run) -> list[tuple[str, str]]:
    """The (source, task) pairs with an image, a target and a prediction."""
    return [
        (source, task)
        for source in run.result["sources"]
        for task in run.tasks
        if f"{source}/image" in run.samples
        and f"{source}/{task}/target" in run.samples
        and f"{source}/{task}/prediction" in run.samples
    ]


def _output(run: Run, task: str) -> Mapping[str, Any]:
    return run.result["tasks"][task]["output"]


def sampled_images(run: Run, source: str) -> np.ndarray:
    """The kept test images of a source, uint8 ``[examples, height, width, 1 or 3]``.

    Raises:
      ValueError: If they are something else.
    """
    images = run.samples[f"{source}/image"]
    if (
        images.ndim != 4
        or images.shape[-1] not in (1, 3)
        or images.dtype != np.uint8
        or 0 in images.shape[1:3]
    ):
        raise ValueError(
            f"{run.path / 'samples.npz'}: '{source}/image' is {images.dtype} "
            f"{images.shape}: it must be uint8 [examples, height, width, 1 or 3]."
        )
    return images


def _arrays(run: Run, source: str, task: str) -> tuple[np.ndarray, ...]:
    """Images as RGB, targets and predictions of one task on one source."""
    images = sampled_images(run, source)
    target = run.samples[f"{source}/{task}/target"]
    prediction = run.samples[f"{source}/{task}/prediction"]
    dims = 3 if _output(run, task).get("dense") else 1
    kinds = "iu" if _output(run, task)["kind"] == "classes" else "iuf"
    if not {target.dtype.kind, prediction.dtype.kind} <= set(kinds):
        raise ValueError(
            f"{run.path / 'samples.npz'}: '{source}/{task}/target' is {target.dtype} "
            f"and its prediction {prediction.dtype}: they must be "
            f"{'classes, which are integers' if kinds == 'iu' else 'numbers'}."
        )
    if not (
        target.shape == prediction.shape == images.shape[:1] + target.shape[1:]
        and target.ndim == dims
    ):
        raise ValueError(
            f"{run.path / 'samples.npz'}: '{source}/{task}/target' {target.shape} and "
            f"its prediction {prediction.shape} don't fit {len(images)} images: each "
            f"must have {dims} axes, examples first."
        )
    return np.repeat(images, 3 // images.shape[-1], axis=-1), target, prediction


def _dense_task(run: Run, source: str, task: str) -> DenseTask:
    images, targets, predictions = _arrays(run, source, task)
    images, targets, predictions = (
        array[:MAX_TILES] for array in (images, targets, predictions)
    )
    output = _output(run, task)
    if output["kind"] == "classes":
        names = _class_names(output)
        legend = tuple(zip(class_colors(len(names)), names, strict=True))
        colored = [class_pixels(array, len(names)) for array in (targets, predictions)]
        scale, low, high = None, "", ""
        unlabelled = targets < 0
    else:
        bottom, top = _value_range(targets, predictions)
        legend = ()
        colored = [value_pixels(array, bottom, top) for array in (targets, predictions)]
        low, high = (f"{end:.3g}".replace("-", "−") for end in (bottom, top))
        ramp = value_pixels(np.linspace(0, 1, 64)[None], 0.0, 1.0)
        scale = pixel_image(ramp, f"Colour scale from {low} to {high}")
        unlabelled = np.isnan(targets)
    tiles = tuple(
        Tile(
            pixel_image(image, f"{source} test example {number}"),
            pixel_image(target, f"Truth of {task} for example {number}"),
            pixel_image(prediction, f"Prediction of {task} for example {number}"),
        )
        for number, (image, target, prediction) in enumerate(
            zip(images, *colored, strict=True), start=1
        )
    )
    return DenseTask(
        task, source, tiles, legend, scale, low, high, bool(unlabelled.any())
    )


def _value_range(targets: np.ndarray, predictions: np.ndarray) -> tuple[float, float]:
    """The scale that truth and prediction share: the range of the labelled truth.

    Predictions count only where there is no truth at all, so that one wild prediction
    doesn't bleach every tile.
    """
    for values in (targets, predictions):
        finite = values[np.isfinite(values)]
        if finite.size:
            return float(finite.min()), float(finite.max())
    return 0.0, 1.0


def _labelled_images(run: Run, source: str, tasks: Sequence[str]) -> LabelledImages:
    arrays = [_arrays(run, source, task) for task in tasks]
    images = arrays[0][0][:MAX_MISTAKES]
    examples = []
    for index, image in enumerate(images):
        verdicts = tuple(
            _verdict(task, _output(run, task), target[index], prediction[index])
            for task, (_, target, prediction) in zip(tasks, arrays, strict=True)
        )
        spoken = "; ".join(
            f"{verdict.task} {verdict.target}, predicted {verdict.prediction}"
            for verdict in verdicts
        )
        examples.append((pixel_image(image, f"{source}: {spoken}"), verdicts))
    misclassified = all(
        any(verdict.wrong for verdict in verdicts) for _, verdicts in examples
    )
    return LabelledImages(source, tuple(examples), misclassified)


def _verdict(
    task: str, output: Mapping[str, Any], target: np.generic, prediction: np.generic
) -> Verdict:
    if output["kind"] != "classes":
        return Verdict(
            task, format_value(float(target)), format_value(float(prediction)), False
        )
    names = _class_names(output)

    def name(index: int) -> str:
        if index < 0:
            return "no label"
        return names[index] if index < len(names) else str(index)

    truth, guess = int(target), int(prediction)
    return Verdict(task, name(truth), name(guess), truth >= 0 and truth != guess)


def _class_names(output: Mapping[str, Any]) -> list[str]:
    """The names of an output's classes, or their numbers where they have none."""
    names = [str(name) for name in output.get("class_names") or ()]
    return names or [str(index) for index in range(output.get("num_classes") or 0)]
