"""What training would cost on TPU slices that are not there."""

from mtl_jax.scaling.compile import Estimate, OutOfMemoryError, estimate
from mtl_jax.scaling.search import search
from mtl_jax.scaling.table import format_estimate, write_estimate
from mtl_jax.scaling.topology import Topology, make_topology, prepare_environment

__all__ = [
    "Estimate",
    "OutOfMemoryError",
    "Topology",
    "estimate",
    "format_estimate",
    "make_topology",
    "prepare_environment",
    "search",
    "write_estimate",
]
