"""The image encoder of CLIP as the transformers library saves it."""

from collections.abc import Mapping
from typing import Any

import fiddle as fdl

from mtl_jax.layers.patch import PatchEmbedding
from mtl_jax.models.pretrained.files import Arrays
from mtl_jax.models.pretrained.huggingface import (
    Channels,
    prefix_of,
    read_sizes,
    trunk_config,
)
from mtl_jax.models.pretrained.mapping import (
    Pretrained,
    attention,
    convert,
    dense,
    norm,
    patch_embedding,
    tokens,
)

IGNORED = (
    *("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    *("embeddings.position_ids", "vision_model.embeddings.position_ids"),
    "classifier.",
)

# Where config.json leaves a field out, it is that of CLIPVisionConfig.
_DEFAULTS = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def convert_clip(
    arrays: Arrays,
    config: Mapping[str, Any],
    *,
    mean: Channels,
    std: Channels,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """The vision transformer of a CLIP (Radford et al., 2021).

    The text encoder and both projections are ignored. The last layer norm, which CLIP
    has on its class token alone, is on all features: patches are useful by it too.

    Args:
      arrays: Arrays of a ``CLIPVisionModel`` or a whole ``CLIPModel``.
      config: Content of ``config.json``.
      mean: Mean of the pixels from 0 to 1 that it was trained on.
      std: Their standard deviation.
      ignore: How further names begin that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of other sizes than in ``config``.
    """
    if config.get("model_type") == "clip":
        config = _DEFAULTS | dict(config.get("vision_config") or {})
    sizes = read_sizes(config, "clip_vision_model")
    prefix, width = prefix_of(arrays, "vision_model."), sizes.width
    embeddings = f"{prefix}embeddings"
    rules = {
        **patch_embedding(
            f"{embeddings}.patch_embedding",
            sizes.num_channels,
            sizes.patch_size,
            width,
            bias=False,
        ),
        **tokens(
            f"{embeddings}.position_embedding.weight",
            {"class_token": f"{embeddings}.class_embedding"},
            sizes.grid,
            width,
            batch=False,
        ),
        # The name is misspelt in the library.
        **norm("pre_norm", f"{prefix}pre_layrnorm", width),
        **norm("norm", f"{prefix}post_layernorm", width),
    }
    for i in range(sizes.depth):
        path, layer = f"block_{i}", f"{prefix}encoder.layers.{i}"
        names = [f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
        rules |= {
            **norm(f"{path}/attention_norm", f"{layer}.layer_norm1", width),
            **attention(
                f"{path}/attention", names, width, sizes.num_heads, qkv_bias=True
            ),
            **norm(f"{path}/mlp_norm", f"{layer}.layer_norm2", width),
            **dense(f"{path}/mlp/up", f"{layer}.mlp.fc1", width, sizes.hidden),
            **dense(f"{path}/mlp/down", f"{layer}.mlp.fc2", sizes.hidden, width),
        }
    embedding = fdl.Partial(PatchEmbedding, use_bias=False, mean=mean, std=std)
    return convert(
        arrays,
        rules,
        trunk_config(sizes, mean, std, embedding=embedding, pre_norm=True),
        (*IGNORED, *ignore),
    )
