"""The batch: one pytree of static shapes for the whole mixture."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of one source in a batch: NumPy arrays, or JAX arrays on devices.

    Attributes:
      inputs: The model's input, ``[batch, height, width, channels]``.
      targets: Task name -> targets ``[batch, ...]``, for the tasks that this source
        labels.
      mask: Task name -> which examples count, ``[batch]`` bool. False marks
        padding; single unlabelled elements are marked in the target itself (-1 or
        NaN).
      index: The records' positions in their source, ``[batch]`` int32, so that an
        example can be named.
    """

    inputs: Any
    targets: Mapping[str, Any]
    mask: Mapping[str, Any]
    index: Any


Batch = Mapping[str, Examples]
"""Source name -> its examples. Each source's share of a batch is static."""


def stack_records(
    records: Sequence[tuple[int, Mapping[str, np.ndarray]]],
    input_field: str,
    target_fields: Mapping[str, str],
    num_examples: int | None = None,
) -> Examples:
    """Stacks records into `Examples`, padding up to ``num_examples``.

    Padding repeats the records themselves, masked out, so that padded examples look
    like data to anything that shares capacity among examples.

    Args:
      records: (index, record) pairs, at least one.
      input_field: Field that holds the input.
      target_fields: Task name -> field that holds its target.
      num_examples: Length of the result; that of ``records`` by default.

    Returns:
      The stacked examples.
    """
    num_records = len(records)
    num_examples = num_examples or num_records
    rows = [records[i % num_records] for i in range(num_examples)]
    mask = np.arange(num_examples) < num_records
    return Examples(
        inputs=np.stack([record[input_field] for _, record in rows]),
        targets={
            task: np.stack([record[field] for _, record in rows])
            for task, field in target_fields.items()
        },
        mask=dict.fromkeys(target_fields, mask),
        index=np.array([index for index, _ in rows], np.int32),
    )
