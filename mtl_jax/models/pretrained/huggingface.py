"""What the vision transformers of the transformers library have in common."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import jax
from jaxtyping import Array

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.mlp import Mlp, exact_gelu, quick_gelu
from mtl_jax.layers.patch import PatchEmbedding
from mtl_jax.models.pretrained.files import (
    Arrays,
    folder_of,
    naming,
    read_arrays,
    read_json,
    read_optional_json,
)
from mtl_jax.models.pretrained.mapping import (
    Pretrained,
    Rule,
    attention,
    dense,
    norm,
    patch_embedding,
    tokens,
)
from mtl_jax.models.vit import VisionTransformer

Channels = tuple[float, ...]
"""One number for all channels, or one for each."""

_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": quick_gelu,
}


def load_huggingface(
    path: str | Path,
    convert: Callable[..., Pretrained],
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """A vision transformer as the transformers library saves it, from local files.

    Args:
      path: Its folder, with ``config.json``, ``preprocessor_config.json`` and
        ``model.safetensors``; or the safetensors file in such a folder.
      convert: Its family: `convert_vit`, `convert_deit`, `convert_dinov2` or
        `convert_clip`.
      mean: Mean of the pixels from 0 to 1 that it was trained on, one number or one a
        channel; by default from ``preprocessor_config.json``.
      std: Their standard deviation, likewise.
      ignore: How further names begin that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of other sizes, or the files are
        damaged, of another family or of a kind that could run code.
      OSError: If a file is missing.
    """
    folder = folder_of(path)
    arrays = read_arrays(path)
    config = read_json(folder / "config.json")
    if mean is None or std is None:
        published = _read_normalisation(folder)
        mean, std = mean or published[0], std or published[1]
    with naming(path):
        return convert(arrays, config, mean=mean, std=std, ignore=ignore)


def _read_normalisation(folder: Path) -> tuple[Channels, Channels]:
    path = folder / "preprocessor_config.json"
    content = read_optional_json(path)
    if content.get("do_normalize") is False:
        return (0.0,), (1.0,)
    try:
        return tuple(content["image_mean"]), tuple(content["image_std"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not tell how pixels are normalised, in image_mean and "
            "image_std; put the published one there, or give mean and std, in units "
            "of pixels from 0 to 1"
        ) from error


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What ``config.json`` says of a trunk.

    Attributes:
      width: Channels of a token.
      depth: Number of blocks.
      num_heads: Attention heads.
      mlp_ratio: Hidden units of an MLP, in units of ``width``.
      patch_size: Side of a patch, in pixels.
      num_channels: Channels of an image.
      grid: Rows and columns of patches of an image of the size that it was trained on.
      activation: The nonlinearity of its MLPs.
      epsilon: Added to variances by layer norms.
      qkv_bias: Whether query, key and value have a bias.
    """

    width: int
    depth: int
    num_heads: int
    mlp_ratio: float
    patch_size: int
    num_channels: int
    grid: tuple[int, int]
    activation: Callable[[Array], Array]
    epsilon: float
    qkv_bias: bool

    @property
    def hidden(self) -> int:
        """Hidden units of an MLP."""
        return round(self.mlp_ratio * self.width)


def read_sizes(config: Mapping[str, Any], *model_types: str) -> Sizes:
    """The sizes of a trunk.

    Args:
      config: Content of ``config.json``.
      *model_types: Kinds of model that the family has.

    Returns:
      The sizes.

    Raises:
      ValueError: If the model is of another kind, or the sizes are unknown to our
        layers.
    """
    kind = config.get("model_type")
    if kind not in model_types:
        raise ValueError(
            f"config.json is of a model of type {kind!r}; this family has "
            f"{', '.join(model_types)}: choose the convert function of its own"
        )
    try:
        width = config["hidden_size"]
        image, patch = (_sides(config[name]) for name in ("image_size", "patch_size"))
        if patch[0] != patch[1]:
            raise ValueError(patch)
        ratio = config.get("mlp_ratio", config.get("intermediate_size", 0) / width)
        sizes = Sizes(
            width=width,
            depth=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            mlp_ratio=ratio,
            patch_size=patch[0],
            num_channels=config.get("num_channels", 3),
            grid=(image[0] // patch[0], image[1] // patch[1]),
            activation=_ACTIVATIONS[config["hidden_act"]],
            epsilon=config["layer_norm_eps"],
            qkv_bias=config.get("qkv_bias", True),
        )
        fits = ratio > 0 and width % sizes.num_heads == 0
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"config.json does not give sizes that are known here ({error!r}); it "
            "needs hidden_size, num_hidden_layers, num_attention_heads, "
            "intermediate_size or mlp_ratio, image_size, patch_size (of a square), "
            f"layer_norm_eps, and hidden_act as one of {', '.join(_ACTIVATIONS)}"
        ) from error
    if not fits:
        raise ValueError(
            f"config.json says that {sizes.num_heads} heads share a width of {width} "
            f"and MLPs have {ratio} times that; restore it from where it was published"
        )
    return sizes


def _sides(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list) else (size, size)
    return height, width


def trunk_config(
    sizes: Sizes, mean: Channels, std: Channels, **fields: Any
) -> fdl.Config:
    """Config of a trunk with a class token and learned positions.

    Args:
      sizes: Its sizes.
      mean: Mean of the pixels that it was trained on, from 0 to 1.
      std: Their standard deviation.
      **fields: Further fields of `mtl_jax.models.VisionTransformer`, or others than the
        usual.

    Returns:
      The config.
    """
    if not sizes.qkv_bias:
        fields["attention"] = fdl.Partial(SelfAttention, qkv_bias=False)
    return fdl.Config(
        VisionTransformer,
        **{
            "width": sizes.width,
            "depth": sizes.depth,
            "num_heads": sizes.num_heads,
            "patch_size": sizes.patch_size,
            "mlp_ratio": float(sizes.mlp_ratio),
            "num_channels": sizes.num_channels,
            "embedding": fdl.Partial(PatchEmbedding, mean=mean, std=std),
            "mlp": mlp_config(sizes.activation),
            "norm_epsilon": float(sizes.epsilon),
            "class_token": "inside",
            "position_grid": sizes.grid,
        }
        | fields,
    )


def mlp_config(activation: Callable[[Array], Array]) -> Any:
    """What makes an MLP with an activation, as configs have it."""
    # The default's name is none that a saved config may hold.
    if activation is jax.nn.gelu:
        return Mlp
    return fdl.Partial(Mlp, activation=activation)


def prefix_of(arrays: Arrays, *prefixes: str) -> str:
    """Which of some prefixes names have: the one that a head puts before the trunk."""
    return next((p for p in prefixes if any(name.startswith(p) for name in arrays)), "")


def embedding_rules(
    prefix: str, sizes: Sizes, extra: Mapping[str, str]
) -> dict[str, Rule]:
    """Patches, positions and extra tokens, as ViT, DeiT and DINOv2 name them."""
    embeddings = f"{prefix}embeddings"
    return patch_embedding(
        f"{embeddings}.patch_embeddings.projection",
        sizes.num_channels,
        sizes.patch_size,
        sizes.width,
    ) | tokens(
        f"{embeddings}.position_embeddings",
        {path: f"{embeddings}.{name}" for path, name in extra.items()},
        sizes.grid,
        sizes.width,
    )


def attention_rules(path: str, layer: str, sizes: Sizes) -> dict[str, Rule]:
    """Attention as ViT, DeiT and DINOv2 name it."""
    return attention(
        path,
        [
            *(f"{layer}.attention.attention.{n}" for n in ("query", "key", "value")),
            f"{layer}.attention.output.dense",
        ],
        sizes.width,
        sizes.num_heads,
        qkv_bias=sizes.qkv_bias,
    )


def vit_rules(prefix: str, sizes: Sizes, extra: Mapping[str, str]) -> dict[str, Rule]:
    """A whole trunk as ViT and DeiT name it."""
    rules = embedding_rules(prefix, sizes, extra)
    for i in range(sizes.depth):
        path, layer = f"block_{i}", f"{prefix}encoder.layer.{i}"
        rules |= {
            **norm(f"{path}/attention_norm", f"{layer}.layernorm_before", sizes.width),
            **attention_rules(f"{path}/attention", layer, sizes),
            **norm(f"{path}/mlp_norm", f"{layer}.layernorm_after", sizes.width),
            **dense(
                f"{path}/mlp/up",
                f"{layer}.intermediate.dense",
                sizes.width,
                sizes.hidden,
            ),
            **dense(
                f"{path}/mlp/down", f"{layer}.output.dense", sizes.hidden, sizes.width
            ),
        }
    return rules | norm("norm", f"{prefix}layernorm", sizes.width)
