"""Experts and tasks: who uses which, models of one task, of more, of dense ones."""

from mtl_jax.models.experts.extend import extend, only_new
from mtl_jax.models.experts.extract import Extracted, extract, kept_experts
from mtl_jax.models.experts.layers import ExpertLayer, expert_layers
from mtl_jax.models.experts.upcycle import upcycle
from mtl_jax.models.experts.usage import Usage, expert_usage

__all__ = [
    "ExpertLayer",
    "Extracted",
    "Usage",
    "expert_layers",
    "expert_usage",
    "extend",
    "extract",
    "kept_experts",
    "only_new",
    "upcycle",
]
