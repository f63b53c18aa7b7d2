"""ViT as the transformers library saves it."""

from collections.abc import Mapping
from typing import Any

from mtl_jax.models.pretrained.files import Arrays
from mtl_jax.models.pretrained.huggingface import (
    Channels,
    prefix_of,
    read_sizes,
    trunk_config,
    vit_rules,
)
from mtl_jax.models.pretrained.mapping import Pretrained, convert

IGNORED = (
    *("pooler.", "vit.pooler.", "classifier.", "decoder."),
    *("embeddings.mask_token", "vit.embeddings.mask_token"),
)


def convert_vit(
    arrays: Arrays,
    config: Mapping[str, Any],
    *,
    mean: Channels,
    std: Channels,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """A ViT (Dosovitskiy et al., 2021), or another model of its kind, such as DINO's.

    Its pooler and its classifier are ignored.

    Args:
      arrays: Arrays of a ``ViTModel`` or a model with a head on one.
      config: Content of ``config.json``.
      mean: Mean of the pixels from 0 to 1 that it was trained on.
      std: Their standard deviation.
      ignore: How further names begin that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of other sizes than in ``config``.
    """
    sizes = read_sizes(config, "vit")
    extra = {"class_token": "cls_token"}
    return convert(
        arrays,
        vit_rules(prefix_of(arrays, "vit."), sizes, extra),
        trunk_config(sizes, mean, std),
        (*IGNORED, *ignore),
    )
