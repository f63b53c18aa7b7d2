"""Larger images of the same data, where the size is what matters."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mtl_jax.data.source import Field, Record, Source


@dataclasses.dataclass(frozen=True)
class Enlarged:
    """Another source with every pixel repeated along both sides.

    It adds no detail: it stands in for a data set of larger images, so that a model for
    these can be tried, timed and compiled without one.

    Fields are those of the other source. Its image, and what has a value for each pixel
    of the image, is ``factor`` times as high and as wide.

    Attributes:
      source: The other source.
      factor: How often each pixel is repeated along either side.
      image_field: Field that holds the image.

    Raises:
      ValueError: If the factor is not positive, or there is no such field.
    """

    source: Source
    factor: int
    image_field: str = "image"

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"factor is {self.factor}; it must be at least 1")
        if self.image_field not in self.source.fields:
            raise ValueError(
                f"image_field is {self.image_field!r}; the fields of the source are "
                f"{sorted(self.source.fields)}"
            )

    @property
    def fields(self) -> Mapping[str, Field]:
        """The fields of the other source, enlarged."""
        return {
            name: dataclasses.replace(
                field,
                shape=tuple(
                    size * self.factor if axis < 2 else size
                    for axis, size in enumerate(field.shape)
                ),
            )
            if self._has_pixels(field.shape)
            else field
            for name, field in self.source.fields.items()
        }

    def _has_pixels(self, shape: tuple[int, ...]) -> bool:
        return shape[:2] == self.source.fields[self.image_field].shape[:2]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return {
            name: self._enlarge(array) for name, array in self.source[index].items()
        }

    def _enlarge(self, array: np.ndarray) -> np.ndarray:
        if not self._has_pixels(array.shape):
            return array
        return array.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
