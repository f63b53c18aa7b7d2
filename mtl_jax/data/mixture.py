"""Mixtures: several sources, each labelled for some of the tasks, in every batch."""

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from mtl_jax.data.batch import Batch, Examples, stack_records
from mtl_jax.data.source import Record, Source

Augment = Callable[[Record, np.random.Generator], Record]

Rows = Callable[[int], np.ndarray]
"""Number of examples -> positions of those that this process reads, ascending."""


@dataclasses.dataclass(frozen=True)
class Component:
    """One data set of a mixture.

    Attributes:
      train: Records to train on.
      test: Records to evaluate on.
      tasks: Names of the tasks that this data set labels.
      weight: Relative share of the examples of a batch; 0 leaves the data set out
        of training.
      augment: Random change of a training record, given a NumPy generator.
      input_field: Field of the records that holds the model's input.
    """

    train: Source
    test: Source
    tasks: tuple[str, ...]
    weight: float = 1.0
    augment: Augment | None = None
    input_field: str = "image"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Data sets that are trained on together.

    Every batch holds a fixed number of examples of each data set, in proportion to
    ``weight ** (1 / temperature)``: shapes are static, whatever each set labels.

    Attributes:
      components: Name -> data set.
      batch_size: Examples in a batch, over all data sets.
      temperature: Above 1 evens the shares out, below 1 sharpens them.
    """

    components: Mapping[str, Component]
    batch_size: int
    temperature: float = 1.0

    def examples_per_batch(self, multiple_of: int = 1) -> dict[str, int]:
        """Source name -> its number of examples in each batch.

        Shares are rounded by largest remainder to multiples of ``multiple_of`` and
        add up to ``batch_size``; no source with a positive weight is left out.

        Args:
          multiple_of: What every share must be divisible by, so that it splits
            evenly over devices and routing groups.

        Returns:
          The shares, without the sources of weight 0.

        Raises:
          ValueError: If weights are negative, infinite or all 0, the temperature is not
            positive, or the batch is too small to give every source a share.
        """
        if not self.temperature > 0:
            raise ValueError(
                f"mixture.temperature is {self.temperature}; it must be positive"
            )
        weights = {name: c.weight for name, c in self.components.items()}
        finite = all(0 <= weight < math.inf for weight in weights.values())
        if not finite or not any(weights.values()):
            raise ValueError(
                f"mixture weights are {weights}; they must be finite, at least 0 and "
                "not all 0"
            )
        names = [name for name, weight in weights.items() if weight > 0]
        units, remainder = divmod(self.batch_size, multiple_of)
        if remainder or units < len(names):
            raise ValueError(
                f"mixture.batch_size is {self.batch_size}; it must be a multiple of "
                f"{multiple_of} (devices and routing groups) and at least "
                f"{multiple_of * len(names)} for the {len(names)} sources in use"
            )
        share = np.array([weights[name] for name in names])
        # Over the largest, so that no power of it overflows.
        share = (share / share.max()) ** (1 / self.temperature)
        exact = share / share.sum() * units
        quota = np.maximum(1, np.floor(exact)).astype(int)
        while quota.sum() < units:
            quota[np.argmax(exact - quota)] += 1
        while quota.sum() > units:
            quota[np.argmin(np.where(quota > 1, exact - quota, np.inf))] -= 1
        return {
            name: int(count) * multiple_of
            for name, count in zip(names, quota, strict=True)
        }


class _Indexed:
    """A source whose records come with their index."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index) -> tuple[int, Record]:
        return int(index), self._source[int(index)]


class _FixedShares(grain.transforms.DatasetSelectionMap):
    """Interleaves data sets so that every batch holds the same share of each.

    Of each share, only the rows of this process are drawn.
    """

    def __init__(self, shares: Sequence[int], rows: Rows):
        self._shares = tuple(shares)
        offsets = [rows(share) for share in shares]
        self._parent = np.repeat(np.arange(len(shares)), [len(o) for o in offsets])
        self._offset = np.concatenate(offsets)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, position = divmod(index, len(self._parent))
        parent = int(self._parent[position])
        return parent, batch * self._shares[parent] + int(self._offset[position])


def training_batches(
    mixture: Mixture,
    target_fields: Mapping[str, str],
    seed: int,
    multiple_of: int = 1,
    prefetch: int = 4,
    rows: Rows = np.arange,
) -> grain.DatasetIterator:
    """An endless, deterministic, checkpointable iterator over training batches.

    Each source is shuffled anew in every epoch by a seed made of ``seed`` and its
    name, so that adding a source does not reorder the others.

    Args:
      mixture: What to draw from.
      target_fields: Task name -> record field of its target.
      seed: Seed of shuffling and augmentation.
      multiple_of: See `Mixture.examples_per_batch`.
      prefetch: Batches that a background thread keeps ready.
      rows: Which of each source's examples of a batch this process reads, in a run of
        several processes; all by default. No other records are read.

    Returns:
      A Grain iterator of `Batch`; its state is a small JSON document, and the same in
      all processes.
    """
    shares = mixture.examples_per_batch(multiple_of)
    lengths = {name: len(rows(share)) for name, share in shares.items()}
    collate = functools.partial(
        _collate, mixture=mixture, lengths=lengths, target_fields=target_fields
    )
    parents = [
        _shuffled(mixture.components[name], _seed(seed, name)) for name in shares
    ]
    return iter(
        grain.MapDataset.select_from_datasets(
            parents, _FixedShares([*shares.values()], rows)
        )
        .batch(sum(lengths.values()), batch_fn=collate)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        )
    )


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())


def _shuffled(component: Component, seed: int) -> grain.MapDataset:
    dataset = (
        grain.MapDataset.source(_Indexed(component.train)).seed(seed).shuffle().repeat()
    )
    if component.augment is None:
        return dataset
    augment = component.augment
    return dataset.random_map(lambda pair, rng: (pair[0], augment(pair[1], rng)))


def _collate(
    records: Sequence[tuple[int, Record]],
    mixture: Mixture,
    lengths: Mapping[str, int],
    target_fields: Mapping[str, str],
) -> Batch:
    batch, start = {}, 0
    for name, length in lengths.items():
        component = mixture.components[name]
        batch[name] = stack_records(
            records[start : start + length],
            component.input_field,
            {task: target_fields[task] for task in component.tasks},
        )
        start += length
    return batch


def evaluation_batches(
    component: Component,
    target_fields: Mapping[str, str],
    batch_size: int,
    num_examples: int | None = None,
    rows: Rows = np.arange,
) -> Iterator[Examples]:
    """The test records of one data set in order, the last batch padded and masked.

    Args:
      component: The data set.
      target_fields: Task name -> record field of its target.
      batch_size: Examples in each batch, over all processes.
      num_examples: How many records to use; all by default.
      rows: Which examples of a batch this process reads; all by default.

    Yields:
      `Examples` of exactly ``batch_size``, or the rows of this process.
    """
    fields = {task: target_fields[task] for task in component.tasks}
    total = min(len(component.test), num_examples or len(component.test))
    here = rows(batch_size)
    for start in range(0, total, batch_size):
        number = min(batch_size, total - start)
        # Padding repeats the records of the batch, each of which is read once.
        indices = start + here % number
        records = {int(i): component.test[int(i)] for i in np.unique(indices)}
        examples = stack_records(
            [(int(i), records[int(i)]) for i in indices], component.input_field, fields
        )
        yield dataclasses.replace(
            examples, mask=dict.fromkeys(fields, np.asarray(here < number))
        )
