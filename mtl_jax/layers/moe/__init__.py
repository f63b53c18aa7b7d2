"""The sparse mixture-of-experts layer: routers, dispatch, experts, losses."""

from mtl_jax.layers.moe.attention import MoeAttention
from mtl_jax.layers.moe.layer import MoE

__all__ = ["MoE", "MoeAttention"]
