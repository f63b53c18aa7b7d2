"""The .npz files of google-research's big_vision and vision_transformer."""

import math
import re
from pathlib import Path

import fiddle as fdl
import numpy as np
from jaxtyping import Float

from mtl_jax.layers.patch import PatchEmbedding
from mtl_jax.models.pretrained.files import Arrays, naming, read_arrays
from mtl_jax.models.pretrained.mapping import Pretrained, Rule, convert, same
from mtl_jax.models.vit import VisionTransformer

IGNORED = (
    *("head/", "pre_logits/", "MAPHead_0/"),
    # The pooling by attention was not in a module of its own at first.
    *("probe", "MlpBlock_0/", "MultiHeadDotProductAttention_0/", "LayerNorm_0/"),
)


def load_big_vision(
    path: str | Path,
    *,
    prefix: str = "",
    position_grid: tuple[int, int] | None = None,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """A vision transformer of big_vision or vision_transformer, from a local file.

    Its sizes are those of its arrays, and pixels are those of our trunks, from -1 to 1.

    Args:
      path: The ``.npz`` file.
      prefix: How the names of the trunk begin, such as ``params/img/`` in SigLIP's
        files; what begins otherwise is ignored.
      position_grid: Rows and columns of its positions; by default a square. Needed
        where the positions are sine-cosine ones, which are not in the file.
      ignore: How further names begin, behind ``prefix``, that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of unexpected sizes, or the file
        is damaged.
      OSError: If the file is missing.
    """
    arrays = read_arrays(path)
    own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    with naming(path):
        return convert_big_vision(own, position_grid=position_grid, ignore=ignore)


def convert_big_vision(
    arrays: Arrays,
    *,
    position_grid: tuple[int, int] | None = None,
    ignore: tuple[str, ...] = (),
) -> Pretrained:
    """A vision transformer of big_vision or vision_transformer.

    Classifiers, the layer before them and pooling by attention are ignored.

    Args:
      arrays: The parameters by their paths, parts joined by ``/``.
      position_grid: Rows and columns of its positions; by default a square.
      ignore: How further names begin that the trunk can do without.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, left over or of unexpected sizes.
    """
    arrays = _unstacked(arrays)
    first = "Transformer/encoderblock_0"
    # Layers were numbered through at first, and by their kind later.
    older = f"{first}/MlpBlock_3/Dense_0/kernel" in arrays
    attention, mlp, norms = (
        ("MultiHeadDotProductAttention_1", "MlpBlock_3", ("LayerNorm_0", "LayerNorm_2"))
        if older
        else (
            "MultiHeadDotProductAttention_0",
            "MlpBlock_0",
            ("LayerNorm_0", "LayerNorm_1"),
        )
    )
    patch_size, _, channels, width = _shape(arrays, "embedding/kernel", 4)
    _, num_heads, kv = _shape(arrays, f"{first}/{attention}/query/kernel", 3)
    _, hidden = _shape(arrays, f"{first}/{mlp}/Dense_0/kernel", 2)
    numbers = [re.match(r"Transformer/encoderblock_(\d+)/", name) for name in arrays]
    depth = 1 + max(int(found[1]) for found in numbers if found)
    positions, grid = _positions(arrays, position_grid, width)
    rules = {
        "embedding/projection/kernel": Rule(
            {"embedding/kernel": (patch_size, patch_size, channels, width)},
            lambda array: array.reshape(-1, width),
            "pixels of a patch flattened",
        ),
        "embedding/projection/bias": same("embedding/bias", width),
        **positions,
        **_norm("norm", "Transformer/encoder_norm", width),
    }
    for i in range(depth):
        path, block = f"block_{i}", f"Transformer/encoderblock_{i}"
        rules |= _norm(f"{path}/attention_norm", f"{block}/{norms[0]}", width)
        rules |= _norm(f"{path}/mlp_norm", f"{block}/{norms[1]}", width)
        for part, kernel, bias in (
            *((n, (width, num_heads, kv), (num_heads, kv)) for n in _INNER),
            ("out", (num_heads, kv, width), (width,)),
        ):
            target = f"{path}/attention/{'output' if part == 'out' else part}"
            rules |= _dense(target, f"{block}/{attention}/{part}", kernel, bias)
        rules |= _dense(
            f"{path}/mlp/up", f"{block}/{mlp}/Dense_0", (width, hidden), (hidden,)
        )
        rules |= _dense(
            f"{path}/mlp/down", f"{block}/{mlp}/Dense_1", (hidden, width), (width,)
        )
    trunk = fdl.Config(
        VisionTransformer,
        width=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        mlp_ratio=hidden / width,
        num_channels=channels,
        embedding=PatchEmbedding,
        class_token="inside" if "cls" in arrays else "absent",
        position_grid=grid,
    )
    return convert(arrays, rules, trunk, (*IGNORED, *ignore))


_INNER = ("query", "key", "value")


def _shape(arrays: Arrays, name: str, rank: int) -> tuple[int, ...]:
    if name not in arrays or arrays[name].ndim != rank:
        begins = sorted({other.partition("/")[0] for other in arrays})[:10]
        raise ValueError(
            f"the file has no array {name} of {rank} axes, from which sizes are read; "
            f"its names begin with {', '.join(begins) or 'nothing'}: give prefix, how "
            "those of the trunk begin, or the file of a vision transformer"
        )
    return arrays[name].shape


def _norm(path: str, name: str, width: int) -> dict[str, Rule]:
    return {
        f"{path}/{part}": same(f"{name}/{part}", width) for part in ("scale", "bias")
    }


def _dense(
    path: str, name: str, kernel: tuple[int, ...], bias: tuple[int, ...]
) -> dict[str, Rule]:
    return {
        f"{path}/kernel": same(f"{name}/kernel", *kernel),
        f"{path}/bias": same(f"{name}/bias", *bias),
    }


def _unstacked(arrays: Arrays) -> Arrays:
    """Blocks one by one, where a scan over them kept them in one array each."""
    stacked = "Transformer/encoderblock/"
    result = {}
    for name, array in arrays.items():
        if name.startswith(stacked):
            rest = name.removeprefix(stacked)
            for i, block in enumerate(array):
                result[f"Transformer/encoderblock_{i}/{rest}"] = block
        else:
            result[name] = array
    return result


def _positions(
    arrays: Arrays, grid: tuple[int, int] | None, width: int
) -> tuple[dict[str, Rule], tuple[int, int]]:
    """Rules of positions and class token, and the grid."""
    names = (
        "pos_embedding",
        "Transformer/pos_embedding",
        "Transformer/posembed_input/pos_embedding",
    )
    token = {"class_token": same("cls", 1, 1, width)} if "cls" in arrays else {}
    name = next((name for name in names if name in arrays), None)
    if name is None:
        if grid is None:
            raise ValueError(
                "the file has no positions, so they are sine-cosine ones; give "
                "position_grid, the rows and columns of patches of an image of the "
                "size that the model was trained on"
            )
        fixed = _sincos(*grid, width)
        rules = {"positions": Rule({}, lambda: fixed, "sine-cosine positions")}
        return rules | {path: _flat(rule) for path, rule in token.items()}, grid
    total = _shape(arrays, name, 3)[1]
    shape = (1, total, width)
    # Older models gave the class token a position too, the first.
    side = math.isqrt(total)
    found = grid or (side, side)
    offset = total - math.prod(found)
    if offset not in (0, 1):
        raise ValueError(
            f"{name} has {total} positions, which are no grid of "
            f"{grid or 'equal sides'}; give position_grid, the rows and columns of "
            "patches of an image of the size that the model was trained on"
        )
    rules = {
        "positions": Rule(
            {name: shape},
            lambda array: array[0, offset:].reshape(*found, width),
            "in their grid",
        )
    }
    if token and offset:
        rules["class_token"] = Rule(
            {"cls": (1, 1, width), name: shape},
            lambda token, array: token[0] + array[0, :1],
            "with its position",
        )
    elif token:
        rules["class_token"] = _flat(token["class_token"])
    return rules, found


def _flat(rule: Rule) -> Rule:
    return Rule(rule.sources, lambda array: array[0])


def _sincos(
    rows: int, columns: int, width: int
) -> Float[np.ndarray, "rows columns width"]:
    """Their sine-cosine positions: columns first, and a wavelength of 2π·10⁴ too."""
    frequencies = 1e4 ** -(np.arange(width // 4) / (width // 4 - 1))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    parts = [
        function(place[..., None] * frequencies)
        for place in (column, row)
        for function in (np.sin, np.cos)
    ]
    return np.concatenate(parts, axis=-1).astype(np.float32)
