"""Random changes of training records."""

import numpy as np

from mtl_jax.data.source import Record


def dihedral(record: Record, rng: np.random.Generator) -> Record:
    """One of the eight symmetries of the square, the same for every field.

    Args:
      record: Arrays whose first two axes are the sides of a square image.
      rng: Source of randomness.

    Returns:
      The record, turned and mirrored.
    """
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))

    def apply(array: np.ndarray) -> np.ndarray:
        array = np.rot90(array, turns)
        return array[:, ::-1] if mirror else array

    return {name: apply(array) for name, array in record.items()}


def random_shift(
    record: Record, rng: np.random.Generator, max_shift: int = 2
) -> Record:
    """The field ``image`` moved by up to ``max_shift`` pixels along each axis.

    Args:
      record: A record whose other fields do not depend on position.
      rng: Source of randomness.
      max_shift: Largest shift, in pixels; zeros are moved in.

    Returns:
      The record with its image moved.

    Raises:
      ValueError: If there is no image, or ``max_shift`` is negative or could move all
        of the image out of sight.
    """
    if "image" not in record:
        raise ValueError(f"random_shift moves the field 'image', but has {[*record]}")
    image = record["image"]
    height, width = image.shape[:2]
    if not 0 <= max_shift < min(height, width):
        raise ValueError(
            f"max_shift is {max_shift}; it must be at least 0 and less than the sides "
            f"of the image, {height}x{width} pixels"
        )
    padded = np.zeros(
        (height + 2 * max_shift, width + 2 * max_shift, *image.shape[2:]), image.dtype
    )
    padded[max_shift : max_shift + height, max_shift : max_shift + width] = image
    row, column = rng.integers(2 * max_shift + 1, size=2)
    return record | {"image": padded[row : row + height, column : column + width]}
