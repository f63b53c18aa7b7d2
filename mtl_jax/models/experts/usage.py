"""Which experts a task uses, measured on data."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from mtl_jax.models.experts.layers import expert_layers
from mtl_jax.models.multitask import MultitaskModel, repeat

Usage = Mapping[str, np.ndarray]
"""Layer name -> fraction of a task's tokens that go to each expert, ``[experts]``."""


def expert_usage(
    model: MultitaskModel,
    params: Mapping[str, Any],
    task: str,
    batches: Iterable[Array],
    collections: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Measures which experts the tokens of a task go to, without noise.

    Args:
      model: Trunk and heads.
      params: ``{"trunk": ..., "heads": ...}``.
      task: Name of the task.
      batches: Inputs ``[batch, height, width, channels]``, such as training images of
        the sources that label the task. All of one shape are compiled for once.
      collections: What the trunk keeps besides its parameters, if anything.

    Returns:
      For each layer of experts, the fraction of tokens that go to each of them. It adds
      up to the number of experts that a token goes to.

    Raises:
      ValueError: If there are no batches.
    """
    trunk: Any = model.trunk
    selected = {layer.name: layer.num_selected for layer in expert_layers(trunk)}

    @jax.jit
    def loads(trunk, collections, inputs):
        output = model.apply_trunk(
            repeat(trunk, 1), inputs, (task,), train=False, collections=collections
        )
        return {
            layer: statistics["load"][0]
            for layer, statistics in output.statistics.items()
        }

    totals, count = dict.fromkeys(selected, np.float64(0)), 0
    for inputs in batches:
        size = len(inputs)
        measured = jax.device_get(loads(params["trunk"], collections or {}, inputs))
        totals = {name: totals[name] + size * measured[name] for name in selected}
        count += size
    if not count:
        raise ValueError(f"no batches to measure the experts of task {task!r} on")
    return {
        name: np.asarray(selected[name] * total / count)
        for name, total in totals.items()
    }
