"""Vision transformers as timm names them."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import numpy as np
from jaxtyping import Array

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.mlp import SwiGlu, exact_gelu
from mtl_jax.layers.patch import PatchEmbedding
from mtl_jax.models.pretrained.dinov2 import gated_mlp
from mtl_jax.models.pretrained.files import (
    Arrays,
    folder_of,
    naming,
    read_arrays,
    read_optional_json,
)
from mtl_jax.models.pretrained.huggingface import Channels, mlp_config
from mtl_jax.models.pretrained.mapping import (
    Pretrained,
    Rule,
    convert,
    dense,
    norm,
    patch_embedding,
    same,
)
from mtl_jax.models.vit import VisionTransformer

IGNORED = ("head.", "head_dist.", "fc_norm.", "attn_pool.")


def load_timm(
    path: str | Path,
    *,
    num_heads: int,
    mean: Channels | None = None,
    std: Channels | None = None,
    activation: Callable[[Array], Array] = exact_gelu,
    norm_epsilon: float = 1e-6,
    position_grid: tuple[int, int] | None = None,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """A ``vit_*`` or ``deit*`` of timm, from local files.

    Its sizes are those of its arrays. What arrays do not tell is told by the arguments;
    timm's definition of the model has it.

    Args:
      path: A folder with ``model.safetensors``, and ``config.json`` unless ``mean`` and
        ``std`` are given; or the safetensors file in it.
      num_heads: Attention heads: 3 for tiny, 6 for small, 12 for base, 16 for large.
      mean: Mean of the pixels from 0 to 1 that it was trained on, one number or one a
        channel; by default from ``config.json``.
      std: Their standard deviation, likewise.
      activation: The nonlinearity of its MLPs; ``quick_gelu`` where the model's name
        says so.
      norm_epsilon: Added to variances by layer norms; 1e-5 in CLIP's models.
      position_grid: Rows and columns of its positions; by default a square.
      ignore: How further names begin that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of unexpected sizes, or the files
        are damaged or of a kind that could run code.
      OSError: If a file is missing.
    """
    arrays = read_arrays(path)
    if mean is None or std is None:
        published = read_optional_json(folder_of(path) / "config.json").get(
            "pretrained_cfg", {}
        )
        try:
            mean = mean or tuple(published["mean"])
            std = std or tuple(published["std"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder_of(path)} has no config.json with a pretrained_cfg that "
                "tells how pixels are normalised; put the published one there, or "
                "give mean and std, in units of pixels from 0 to 1"
            ) from error
    with naming(path):
        return convert_timm(
            arrays,
            num_heads=num_heads,
            mean=mean,
            std=std,
            activation=activation,
            norm_epsilon=norm_epsilon,
            position_grid=position_grid,
            ignore=ignore,
        )


def convert_timm(
    arrays: Arrays,
    *,
    num_heads: int,
    mean: Channels,
    std: Channels,
    activation: Callable[[Array], Array] = exact_gelu,
    norm_epsilon: float = 1e-6,
    position_grid: tuple[int, int] | None = None,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """A ``vit_*`` or ``deit*`` of timm.

    Classifiers and the norm that belongs to an averaging one are ignored. A
    distillation token becomes a register.

    Args:
      arrays: The model's ``state_dict``.
      num_heads: Attention heads.
      mean: Mean of the pixels from 0 to 1 that it was trained on.
      std: Their standard deviation.
      activation: The nonlinearity of its MLPs.
      norm_epsilon: Added to variances by layer norms.
      position_grid: Rows and columns of its positions; by default a square.
      ignore: How further names begin that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of unexpected sizes.
    """
    width, channels, patch_size, _ = _shape(arrays, "patch_embed.proj.weight", 4)
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"num_heads is {num_heads}, which does not divide the width {width}; take "
            "it from timm's definition of the model"
        )
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in arrays]
    depth = 1 + max((int(found[1]) for found in numbers if found), default=-1)
    embedding_bias = "patch_embed.proj.bias" in arrays
    rules = patch_embedding(
        "patch_embed.proj", channels, patch_size, width, bias=embedding_bias
    )
    token_rules, grid, num_registers = _tokens(arrays, position_grid, width)
    rules |= token_rules
    units, _ = _shape(arrays, "blocks.0.mlp.fc1.weight", 2)
    _, hidden = _shape(arrays, "blocks.0.mlp.fc2.weight", 2)
    gated = units == 2 * hidden
    if gated and hidden % 8:
        raise ValueError(
            f"blocks.0.mlp is gated and has {hidden} hidden units; SwiGlu has a "
            "multiple of 8"
        )
    scaled = "blocks.0.ls1.gamma" in arrays
    qkv_bias = "blocks.0.attn.qkv.bias" in arrays
    output_bias = "blocks.0.attn.proj.bias" in arrays
    for i in range(depth):
        path, block = f"block_{i}", f"blocks.{i}"
        rules |= {
            **norm(f"{path}/attention_norm", f"{block}.norm1", width),
            **_attention(
                f"{path}/attention",
                f"{block}.attn",
                (width, num_heads),
                qkv_bias=qkv_bias,
                output_bias=output_bias,
            ),
            **norm(f"{path}/mlp_norm", f"{block}.norm2", width),
        }
        up, down = f"{block}.mlp.fc1", f"{block}.mlp.fc2"
        if gated:
            rules |= gated_mlp(f"{path}/mlp", up, down, width, hidden)
        else:
            rules |= dense(f"{path}/mlp/up", up, width, hidden)
            rules |= dense(f"{path}/mlp/down", down, hidden, width)
        if scaled:
            rules[f"{path}/attention_scale"] = same(f"{block}.ls1.gamma", width)
            rules[f"{path}/mlp_scale"] = same(f"{block}.ls2.gamma", width)
    norms = {"pre_norm": "norm_pre", "norm": "norm"}
    present = {path: f"{name}.weight" in arrays for path, name in norms.items()}
    for path, name in norms.items():
        if present[path]:
            rules |= norm(path, name, width)
    trunk = fdl.Config(
        VisionTransformer,
        width=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        # SwiGlu is given the hidden units of an Mlp with as many parameters.
        mlp_ratio=(1.5 if gated else 1.0) * hidden / width,
        num_channels=channels,
        embedding=fdl.Partial(
            PatchEmbedding, use_bias=embedding_bias, mean=mean, std=std
        ),
        attention=fdl.Partial(
            SelfAttention, qkv_bias=qkv_bias, output_bias=output_bias
        ),
        mlp=SwiGlu if gated else mlp_config(activation),
        layer_scale=1.0 if scaled else None,
        norm_epsilon=norm_epsilon,
        class_token="inside" if "cls_token" in arrays else "absent",
        num_registers=num_registers,
        position_grid=grid,
        antialias_positions=True,
        pre_norm=present["pre_norm"],
        final_norm=present["norm"],
    )
    return convert(arrays, rules, trunk, (*IGNORED, *ignore))


def _shape(arrays: Arrays, name: str, rank: int) -> tuple[int, ...]:
    if name not in arrays or arrays[name].ndim != rank:
        raise ValueError(
            f"the file has no array {name} of {rank} axes, from which sizes are read; "
            "give the file of a vision transformer of timm"
        )
    return arrays[name].shape


def _attention(
    path: str,
    name: str,
    sizes: tuple[int, int],
    *,
    qkv_bias: bool,
    output_bias: bool,
) -> dict[str, Rule]:
    width, num_heads = sizes
    heads = (num_heads, width // num_heads)
    rules = {}
    for index, part in enumerate(("query", "key", "value")):
        rows = slice(index * width, (index + 1) * width)
        rules[f"{path}/{part}/kernel"] = Rule(
            {f"{name}.qkv.weight": (3 * width, width)},
            lambda array, rows=rows: array[rows].T.reshape(width, *heads),
            "a third, transposed, split into heads",
        )
        if qkv_bias:
            rules[f"{path}/{part}/bias"] = Rule(
                {f"{name}.qkv.bias": (3 * width,)},
                lambda array, rows=rows: array[rows].reshape(heads),
                "a third, split into heads",
            )
    rules[f"{path}/output/kernel"] = Rule(
        {f"{name}.proj.weight": (width, width)},
        lambda array: array.T.reshape(*heads, width),
        "transposed, split into heads",
    )
    if output_bias:
        rules[f"{path}/output/bias"] = same(f"{name}.proj.bias", width)
    return rules


def _tokens(
    arrays: Arrays, grid: tuple[int, int] | None, width: int
) -> tuple[dict[str, Rule], tuple[int, int], int]:
    """Rules of positions and extra tokens, the grid, and the number of registers.

    Some models have positions for the extra tokens, which come first, and some have
    none: their number tells.
    """
    names = [n for n in ("cls_token", "dist_token", "reg_token") if n in arrays]
    counts = [_shape(arrays, name, 3)[1] for name in names]
    total = _shape(arrays, "pos_embed", 3)[1]
    grids = {}
    for with_extra in (sum(counts), 0):
        side = math.isqrt(max(total - with_extra, 0))
        candidate = grid or (side, side)
        if math.prod(candidate) + with_extra == total:
            grids[with_extra] = candidate
    if len(grids) != 1:
        raise ValueError(
            f"pos_embed has {total} positions for {sum(counts)} extra tokens and a "
            f"grid of {grid or 'equal sides'}; give position_grid, the rows and "
            "columns of patches of an image of the size that the model was trained on"
        )
    ((offset, found),) = grids.items()
    shape = (1, total, width)
    rules = {
        "positions": Rule(
            {"pos_embed": shape},
            lambda array: array[0, offset:].reshape(*found, width),
            "in their grid",
        )
    }
    starts = np.cumsum([0, *counts])
    pieces = {
        name: (count, slice(start, start + count))
        for name, count, start in zip(names, counts, starts[:-1], strict=True)
    }
    registers = [name for name in names if name != "cls_token"]
    for path, sources in (("class_token", ["cls_token"]), ("registers", registers)):
        if set(sources) & set(pieces):
            rules[path] = _extra(pieces, sources, shape if offset else None, width)
    return rules, found, sum(pieces[name][0] for name in registers)


def _extra(
    pieces: Mapping[str, tuple[int, slice]],
    names: list[str],
    positions: tuple[int, ...] | None,
    width: int,
) -> Rule:
    """Extra tokens, with their positions added where they have some."""
    sources: dict[str, Any] = {name: (1, pieces[name][0], width) for name in names}
    if positions is None:
        return Rule(sources, lambda *tokens: np.concatenate(tokens, axis=1)[0])
    rows = np.concatenate([np.r_[pieces[name][1]] for name in names])
    return Rule(
        sources | {"pos_embed": positions},
        lambda *arrays: np.concatenate(arrays[:-1], axis=1)[0] + arrays[-1][0, rows],
        "with their positions",
    )
