"""Data: sources, mixtures of them, and the batches they make."""

from mtl_jax.data.batch import Batch, Examples, stack_records
from mtl_jax.data.mixture import (
    Component,
    Mixture,
    evaluation_batches,
    training_batches,
)
from mtl_jax.data.source import Field, Record, Source
from mtl_jax.data.transforms import dihedral, random_shift

__all__ = [
    "Batch",
    "Component",
    "Examples",
    "Field",
    "Mixture",
    "Record",
    "Source",
    "dihedral",
    "evaluation_batches",
    "random_shift",
    "stack_records",
    "training_batches",
]
