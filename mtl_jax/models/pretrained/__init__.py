"""Published vision transformers as our trunks, from local files."""

from mtl_jax.models.pretrained.big_vision import convert_big_vision, load_big_vision
from mtl_jax.models.pretrained.clip import convert_clip
from mtl_jax.models.pretrained.deit import convert_deit
from mtl_jax.models.pretrained.dinov2 import convert_dinov2
from mtl_jax.models.pretrained.files import read_arrays
from mtl_jax.models.pretrained.huggingface import load_huggingface
from mtl_jax.models.pretrained.mapping import Pretrained, Row
from mtl_jax.models.pretrained.start import warm_start
from mtl_jax.models.pretrained.timm import convert_timm, load_timm
from mtl_jax.models.pretrained.vit import convert_vit

__all__ = [
    "Pretrained",
    "Row",
    "convert_big_vision",
    "convert_clip",
    "convert_deit",
    "convert_dinov2",
    "convert_timm",
    "convert_vit",
    "load_big_vision",
    "load_huggingface",
    "load_timm",
    "read_arrays",
    "warm_start",
]
