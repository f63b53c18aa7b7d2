"""Everything that training changes, as one pytree."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run between two steps.

    Attributes:
      step: Number of updates done.
      params: ``{"trunk", "heads"}``.
      aggregator_state: State of the aggregator of task gradients.
      optimizer_state: State of the Optax chain behind it.
      key: PRNG key of the run; the key of a step is this one folded with its number.
      collections: What the trunk keeps besides its parameters and changes in training,
        such as the biases of a router without auxiliary losses; mostly empty.
      faults: What is remembered of numerical faults, a `mtl_jax.train.faults`
        ``FaultState``.
    """

    step: Int[Array, ""]
    params: Mapping
    aggregator_state: Any
    optimizer_state: optax.OptState
    key: Key[Array, ""]
    collections: Mapping = dataclasses.field(default_factory=dict)
    faults: Any = None

    @property
    def variables(self) -> Mapping:
        """All that predictions depend on: parameters and collections."""
        return {**self.params, "collections": self.collections}
