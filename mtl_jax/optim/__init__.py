"""Multitask optimization: task gradients in, one gradient out.

Stands alone: needs JAX and Optax, and works with any model. Each method that looks only
at the Gramian has its pure function too, for those who bring a Gramian:
`from mtl_jax.optim.mgda import weights`.
"""

from mtl_jax.optim.aggregator import (
    Aggregator,
    AggregatorState,
    RowState,
    chain_after,
    conflict_rate,
    cosine_similarity,
    from_rows,
    from_weights,
    gramian,
    weighted_sum,
)
from mtl_jax.optim.balancer import Balancer, BalancerState, from_balancer
from mtl_jax.optim.cagrad import cagrad
from mtl_jax.optim.canary import check_task_gradients
from mtl_jax.optim.mgda import mgda
from mtl_jax.optim.pcgrad import pcgrad
from mtl_jax.optim.sharpness import sharpness_aware
from mtl_jax.optim.sum import sum
from mtl_jax.optim.upgrad import upgrad

__all__ = [
    "Aggregator",
    "AggregatorState",
    "Balancer",
    "BalancerState",
    "RowState",
    "cagrad",
    "chain_after",
    "check_task_gradients",
    "conflict_rate",
    "cosine_similarity",
    "from_balancer",
    "from_rows",
    "from_weights",
    "gramian",
    "mgda",
    "pcgrad",
    "sharpness_aware",
    "sum",
    "upgrad",
    "weighted_sum",
]
