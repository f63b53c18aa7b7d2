"""What a task is: data only."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array

from mtl_jax.tasks.losses import LossTerms
from mtl_jax.tasks.metrics import Metric


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to predict.

    Attributes:
      name: Unique name; appears in parameters, metrics and reports.
      head: Module that maps trunk features ``[batch, height, width, channels]`` to
        a prediction.
      loss: Function of (prediction, target) to elementwise losses and the mask of
        labelled elements, which is that of `mtl_jax.tasks.labelled`.
      metrics: What the task is judged by; the first is its headline.
      target: Field of the sources' records that holds the target; the task's name
        where empty.
    """

    name: str
    head: nn.Module
    loss: Callable[[Array, Array], LossTerms]
    metrics: tuple[Metric, ...]
    target: str = ""

    @property
    def field(self) -> str:
        """The record field that holds this task's target."""
        return self.target or self.name
