"""Meshes, rules that shard parameters over them, and reports of what they do."""

from mtl_jax.sharding.mesh import make_mesh
from mtl_jax.sharding.report import digest, format_report, report
from mtl_jax.sharding.rules import Rules, param_shardings, spec

__all__ = [
    "Rules",
    "digest",
    "format_report",
    "make_mesh",
    "param_shardings",
    "report",
    "spec",
]
