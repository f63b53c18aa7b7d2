"""Models: trunks, and trunks with heads."""

from mtl_jax.models.multitask import MultitaskModel, TrunkOutput
from mtl_jax.models.vit import VisionTransformer

__all__ = ["MultitaskModel", "TrunkOutput", "VisionTransformer"]
