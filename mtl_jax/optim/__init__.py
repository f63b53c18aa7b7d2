"""Multitask optimization: task gradients in, one gradient out.

Stands alone: needs JAX and Optax, and works with any model.
"""

from mtl_jax.optim.aggregator import (
    Aggregator,
    AggregatorState,
    chain_after,
    conflict_rate,
    cosine_similarity,
    from_weights,
    gramian,
    weighted_sum,
)
from mtl_jax.optim.pcgrad import pcgrad
from mtl_jax.optim.sharpness import sharpness_aware
from mtl_jax.optim.sum import sum

__all__ = [
    "Aggregator",
    "AggregatorState",
    "chain_after",
    "conflict_rate",
    "cosine_similarity",
    "from_weights",
    "gramian",
    "pcgrad",
    "sharpness_aware",
    "sum",
    "weighted_sum",
]
