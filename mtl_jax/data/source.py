"""What a data source is: random access to records of named fields."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

Record = dict[str, np.ndarray]
"""One example: field name -> array."""


@dataclasses.dataclass(frozen=True)
class Field:
    """The static description of one field of a source's records.

    An unlabelled entry of an integer target is -1, of a floating-point target NaN.

    Attributes:
      shape: Shape of one record's array.
      dtype: NumPy dtype name, such as ``"uint8"``.
      num_classes: Number of classes of a categorical target, else None.
      class_names: Names of those classes, if they have any.
    """

    shape: tuple[int, ...]
    dtype: str
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """Random access to the records of one split of one data set."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """The fields that every record has, the input image among them."""
        ...

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int) -> Record:
        """The record at ``index`` in ``[0, len)``."""
        ...
