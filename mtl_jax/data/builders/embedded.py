"""TFDS builders that write what the embedded sources hold."""

import abc
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtl_jax.data.source import Field, Source
from mtl_jax.data.sources import SPLITS, digits, earth, multi_digits


class SourceBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the splits of a source, each in the order of the source.

    A class map is a tensor to TFDS. The names of its classes go into the metadata of
    the data set, under ``class_names``.
    """

    VERSION = tfds.core.Version("1.0.0")

    @abc.abstractmethod
    def source(self, split: str) -> Source:
        """The source of one split."""

    def _info(self) -> tfds.core.DatasetInfo:
        source = self.source("test")
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(source).__doc__,
            features=tfds.features.FeaturesDict(
                {name: feature(field) for name, field in source.fields.items()}
            ),
            metadata=tfds.core.MetadataDict(class_names=map_names(source.fields)),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        source = self.source(split)
        for index in range(len(source)):
            record = source[index]
            yield index, {k: v if v.shape else v.item() for k, v in record.items()}


class Earth(SourceBuilder):
    """Builds `mtl_jax.data.sources.earth.Earth` as ``earth``."""

    def source(self, split: str) -> Source:
        """The tiles of one split."""
        return earth.Earth(split)


class Digits(SourceBuilder):
    """Builds `mtl_jax.data.sources.digits.Digits` as ``digits``."""

    def source(self, split: str) -> Source:
        """The digits of one split."""
        return digits.Digits(split)


class MultiDigits(SourceBuilder):
    """Builds `mtl_jax.data.sources.multi_digits.MultiDigits` as ``multi_digits``."""

    def source(self, split: str) -> Source:
        """The pairs of digits of one split."""
        return multi_digits.MultiDigits(split)


def feature(field: Field) -> tfds.features.FeatureConnector:
    """The TFDS feature for a field; a tensor for all but a scalar class."""
    if field.shape == () and field.class_names:
        return tfds.features.ClassLabel(names=field.class_names)
    return tfds.features.Tensor(shape=field.shape, dtype=np.dtype(field.dtype).type)


def map_names(fields: Mapping[str, Field]) -> dict[str, list[str]]:
    """The class names of the fields that are maps of classes."""
    return {
        name: list(field.class_names)
        for name, field in fields.items()
        if field.shape and field.class_names
    }
