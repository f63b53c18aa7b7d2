"""Two overlapping digits in one image, each a task.

After Sabour et al., "Dynamic Routing Between Capsules" (2017), in the two-task form of
Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization" (2018).
"""

import dataclasses
import functools
import types

import numpy as np
from jaxtyping import Float, Int, UInt8

from mtl_jax.data.source import Field, Record
from mtl_jax.data.sources import check_split
from mtl_jax.data.sources.digits import DIGIT_NAMES, SIZE, load_digits

CANVAS = 36
MAX_SIZE = 1_000_000
DEFAULT_SIZES = types.MappingProxyType({"train": 16_000, "test": 2_000})

FIELDS = types.MappingProxyType(
    {
        "image": Field((SIZE, SIZE, 1), "uint8"),
        "left": Field((), "int32", 10, DIGIT_NAMES),
        "right": Field((), "int32", 10, DIGIT_NAMES),
    }
)


@dataclasses.dataclass(frozen=True)
class MultiDigits:
    """Pairs of digits of the same split of `Digits`, overlapping.

    One digit lies at the top left of a canvas of 36 x 36 pixels, the other at its
    bottom right. Where they overlap the brighter pixel counts. The canvas is then
    shrunk to 28 x 28 by area.

    Fields:
      image: uint8 [28, 28, 1], white on black.
      left: int32 [], the digit at the top left.
      right: int32 [], the digit at the bottom right.

    Records are read-only views.

    Attributes:
      split: ``"train"`` or ``"test"``.
      size: Number of pairs; by default 16,000 for training and 2,000 for the test. A
        smaller source begins like a larger one.

    Raises:
      ValueError: If the split is unknown, the size not from 1 to a million, or the data
        file missing or damaged.
    """

    split: str
    size: int | None = None

    def __post_init__(self):
        check_split(self.split)
        if self.size is not None and not 1 <= self.size <= MAX_SIZE:
            raise ValueError(
                f"size is {self.size}; give a number of pairs from 1 to {MAX_SIZE:,}"
            )
        load_pairs(self.split, len(self))

    @property
    def fields(self) -> types.MappingProxyType[str, Field]:
        """The image and its two digits."""
        return FIELDS

    def __len__(self) -> int:
        return DEFAULT_SIZES[self.split] if self.size is None else self.size

    def __getitem__(self, index: int) -> Record:
        images, left, right = load_pairs(self.split, len(self))
        return {
            "image": images[index],
            "left": left[index, ...],
            "right": right[index, ...],
        }


@functools.cache
def load_pairs(
    split: str, size: int
) -> tuple[
    UInt8[np.ndarray, "pairs 28 28 1"],
    Int[np.ndarray, " pairs"],
    Int[np.ndarray, " pairs"],
]:
    """Makes the read-only images and their left and right digits (int32)."""
    images, digits = load_digits(split)
    # Raw draws modulo the number of images: uniform to 1e-15, and fixed for good.
    draws = np.random.PCG64(1).random_raw((size, 2)) % len(images)
    left, right = draws[:, 0], draws[:, 1]
    pairs = shrink(overlay(images[left, ..., 0], images[right, ..., 0]))[..., None]
    result = pairs, digits[left], digits[right]
    for array in result:
        array.setflags(write=False)
    return result


def overlay(
    left: UInt8[np.ndarray, "pairs 28 28"], right: UInt8[np.ndarray, "pairs 28 28"]
) -> UInt8[np.ndarray, "pairs 36 36"]:
    """Lays each left image at the top left and each right one at the bottom right."""
    canvas = np.zeros((len(left), CANVAS, CANVAS), np.uint8)
    canvas[:, :SIZE, :SIZE] = left
    corner = canvas[:, CANVAS - SIZE :, CANVAS - SIZE :]
    np.maximum(corner, right, out=corner)
    return canvas


def shrink(
    canvas: UInt8[np.ndarray, "pairs 36 36"],
) -> UInt8[np.ndarray, "pairs 28 28"]:
    """Resizes by area: each new pixel is the mean of the 9/7 x 9/7 it covers."""
    weights = area_weights()
    # Sums of at most 81 x 255: whole numbers that float32 holds exactly.
    total = weights @ canvas.astype(np.float32) @ weights.T
    return np.floor(total / 81 + np.float32(0.5)).astype(np.uint8)


def area_weights() -> Float[np.ndarray, "28 36"]:
    """Overlap of each new pixel with each old one, in sevenths of an old pixel."""
    new, old = np.arange(SIZE)[:, None], np.arange(CANVAS)[None, :]
    begin = np.maximum(9 * new, 7 * old)
    end = np.minimum(9 * (new + 1), 7 * (old + 1))
    return np.maximum(end - begin, 0).astype(np.float32)
