"""DINOv2, with registers or without, as the transformers library saves it."""

from collections.abc import Mapping
from typing import Any

from mtl_jax.layers.mlp import SwiGlu
from mtl_jax.models.pretrained.files import Arrays
from mtl_jax.models.pretrained.huggingface import (
    Channels,
    Sizes,
    attention_rules,
    embedding_rules,
    prefix_of,
    read_sizes,
    trunk_config,
)
from mtl_jax.models.pretrained.mapping import (
    Pretrained,
    Rule,
    convert,
    dense,
    norm,
    same,
)


def convert_dinov2(
    arrays: Arrays,
    config: Mapping[str, Any],
    *,
    mean: Channels,
    std: Channels,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """A DINOv2 (Oquab et al., 2024), of any size, with registers (Darcet et al., 2024).

    The token that stands for masked patches, which only its training needs, and a
    classifier are ignored.

    Args:
      arrays: Arrays of a ``Dinov2Model`` or a ``Dinov2WithRegistersModel``, or of a
        model with a head on one.
      config: Content of ``config.json``.
      mean: Mean of the pixels from 0 to 1 that it was trained on.
      std: Their standard deviation.
      ignore: How further names begin that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of other sizes than in ``config``.
    """
    sizes = read_sizes(config, "dinov2", "dinov2_with_registers")
    prefix = prefix_of(arrays, "dinov2.", "dinov2_with_registers.")
    kind = config["model_type"]
    gated = config.get("use_swiglu_ffn", False)
    num_registers = config.get("num_register_tokens", 0)
    rules = embedding_rules(prefix, sizes, {"class_token": "cls_token"})
    if num_registers:
        rules["registers"] = Rule(
            {f"{prefix}embeddings.register_tokens": (1, num_registers, sizes.width)},
            lambda array: array[0],
        )
    for i in range(sizes.depth):
        rules |= _block(f"block_{i}", f"{prefix}encoder.layer.{i}", sizes, gated)
    rules |= norm("norm", f"{prefix}layernorm", sizes.width)
    fields: dict[str, Any] = {"mlp": SwiGlu} if gated else {}
    return convert(
        arrays,
        rules,
        trunk_config(
            sizes,
            mean,
            std,
            layer_scale=1.0,
            num_registers=num_registers,
            # So the library resizes positions in the models with registers alone.
            antialias_positions=kind == "dinov2_with_registers",
            **fields,
        ),
        (f"{prefix}embeddings.mask_token", "classifier.", *ignore),
    )


def _block(path: str, layer: str, sizes: Sizes, gated: bool) -> dict[str, Rule]:
    width = sizes.width
    rules = {
        **norm(f"{path}/attention_norm", f"{layer}.norm1", width),
        **attention_rules(f"{path}/attention", layer, sizes),
        f"{path}/attention_scale": same(f"{layer}.layer_scale1.lambda1", width),
        **norm(f"{path}/mlp_norm", f"{layer}.norm2", width),
        f"{path}/mlp_scale": same(f"{layer}.layer_scale2.lambda1", width),
    }
    if gated:
        return rules | gated_mlp(
            f"{path}/mlp",
            f"{layer}.mlp.weights_in",
            f"{layer}.mlp.weights_out",
            width,
            # SwiGlu's own rounding, which is DINOv2's.
            (2 * sizes.hidden // 3 + 7) // 8 * 8,
        )
    return {
        **rules,
        **dense(f"{path}/mlp/up", f"{layer}.mlp.fc1", width, sizes.hidden),
        **dense(f"{path}/mlp/down", f"{layer}.mlp.fc2", sizes.hidden, width),
    }


def gated_mlp(
    path: str, inner: str, outer: str, width: int, units: int
) -> dict[str, Rule]:
    """A gated MLP whose two inner layers are one, the gate first."""
    rules = {}
    for part, rows in (("gate", slice(units)), ("up", slice(units, None))):
        rules[f"{path}/{part}/kernel"] = Rule(
            {f"{inner}.weight": (2 * units, width)},
            lambda array, rows=rows: array[rows].T,
            "a half, transposed",
        )
        rules[f"{path}/{part}/bias"] = Rule(
            {f"{inner}.bias": (2 * units,)},
            lambda array, rows=rows: array[rows],
            "half",
        )
    return rules | dense(f"{path}/down", outer, units, width)
