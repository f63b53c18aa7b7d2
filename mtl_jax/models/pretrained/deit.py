"""DeiT as the transformers library saves it."""

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
    *("pooler.", "deit.pooler.", "decoder."),
    *("embeddings.mask_token", "deit.embeddings.mask_token"),
    *("classifier.", "cls_classifier.", "distillation_classifier."),
)


def convert_deit(
    arrays: Arrays,
    config: Mapping[str, Any],
    *,
    mean: Channels,
    std: Channels,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """A DeiT with a distillation token (Touvron et al., 2021).

    That token becomes a register. Pooler and classifiers are ignored. A DeiT without
    the token is published as a ViT: `convert_vit`.

    Args:
      arrays: Arrays of a ``DeiTModel`` or a model with a head on one.
      config: Content of ``config.json``.
      mean: Mean of the pixels from 0 to 1 that it was trained on.
      std: Their standard deviation.
      ignore: How further names begin that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of other sizes than in ``config``.
    """
    sizes = read_sizes(config, "deit")
    extra = {"class_token": "cls_token", "registers": "distillation_token"}
    return convert(
        arrays,
        vit_rules(prefix_of(arrays, "deit."), sizes, extra),
        trunk_config(sizes, mean, std, num_registers=1),
        (*IGNORED, *ignore),
    )
