"""From the arrays of a published model to a trunk's parameters, each accounted for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fiddle as fdl
import flax.traverse_util
import numpy as np

from mtl_jax.models.pretrained.files import Arrays

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter is made.

    Attributes:
      sources: Name -> shape of the arrays that it is made of.
      make: From those arrays, in that order, in float32, to the parameter.
      change: What is done to them in words, such as "transposed"; empty for nothing.
    """

    sources: Mapping[str, Shape]
    make: Callable[..., np.ndarray]
    change: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the account.

    Attributes:
      parameter: Path of the trunk's parameter; empty for arrays that are ignored.
      shape: Its shape.
      sources: Name -> shape of the arrays that it was made of.
      change: What was done to them.
    """

    parameter: str
    shape: Shape | None
    sources: Mapping[str, Shape]
    change: str


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published trunk.

    Attributes:
      trunk: Config of the `mtl_jax.models.VisionTransformer` that it is:
        ``fdl.build(trunk)`` makes it, and an experiment's config takes it as it is.
      params: Its parameters, float32 arrays of the host.
      rows: The account: a row for each parameter and each ignored array.
    """

    trunk: fdl.Config
    params: Mapping[str, Any]
    rows: tuple[Row, ...]

    def table(self) -> str:
        """The account as text, a line for each parameter and each ignored array."""
        lines = [
            (
                row.parameter or "(ignored)",
                "" if row.shape is None else _describe(row.shape),
                ", ".join(
                    f"{name} {_describe(shape)}" for name, shape in row.sources.items()
                ),
                row.change,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) for cell, width in zip(line, widths, strict=True)
            ).rstrip()
            for line in lines
        )


def _describe(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def convert(
    arrays: Arrays,
    rules: Mapping[str, Rule],
    trunk: fdl.Config,
    ignored: Sequence[str],
) -> Pretrained:
    """Makes every parameter by its rule and accounts for every array.

    Args:
      arrays: The published arrays.
      rules: Path of a parameter, parts joined by ``/`` -> how it is made.
      trunk: Config of the trunk whose parameters these are.
      ignored: How names begin that the trunk has no use for, such as a classifier's.

    Returns:
      Trunk, parameters and account.

    Raises:
      ValueError: If arrays are missing, of other shapes than expected, or left over;
        the message lists them all.
    """
    needed = {
        name: shape for rule in rules.values() for name, shape in rule.sources.items()
    }
    left = [name for name in arrays if name not in needed]
    faults = {
        "missing": [name for name in needed if name not in arrays],
        "unmatched": [name for name in left if not name.startswith(tuple(ignored))],
        "of other sizes": [
            f"{name} ({_describe(arrays[name].shape)}, not {_describe(shape)})"
            for name, shape in needed.items()
            if name in arrays and arrays[name].shape != shape
        ],
    }
    found = "; ".join(
        f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names
    )
    if found:
        raise ValueError(
            f"the file does not hold the trunk that its sizes say; {found}; check that "
            "it is of this family and that sizes are its own, and name in ignore how "
            "the names begin that the trunk can do without"
        )
    params, rows = {}, []
    for path, rule in rules.items():
        sources = [np.asarray(arrays[name], np.float32) for name in rule.sources]
        params[path] = rule.make(*sources)
        rows.append(Row(path, params[path].shape, rule.sources, rule.change))
    rows += [Row("", None, {name: arrays[name].shape}, "") for name in left]
    return Pretrained(
        trunk, flax.traverse_util.unflatten_dict(params, sep="/"), tuple(rows)
    )


def same(name: str, *shape: int) -> Rule:
    """A parameter that is an array as it is."""
    return Rule({name: shape}, lambda array: array)


def norm(path: str, name: str, width: int) -> dict[str, Rule]:
    """The parameters of a layer norm."""
    return {
        f"{path}/scale": same(f"{name}.weight", width),
        f"{path}/bias": same(f"{name}.bias", width),
    }


def dense(
    path: str, name: str, inputs: int, outputs: int, *, bias: bool = True
) -> dict[str, Rule]:
    """A linear layer, whose kernel PyTorch keeps ``[outputs, inputs]``."""
    rules = {
        f"{path}/kernel": Rule(
            {f"{name}.weight": (outputs, inputs)}, np.transpose, "transposed"
        )
    }
    if bias:
        rules[f"{path}/bias"] = same(f"{name}.bias", outputs)
    return rules


def attention(
    path: str, names: Sequence[str], width: int, num_heads: int, *, qkv_bias: bool
) -> dict[str, Rule]:
    """Attention from four linear layers: those to query, key, value and output."""
    heads = (num_heads, width // num_heads)
    *inputs, output = names
    rules = {}
    for part, name in zip(("query", "key", "value"), inputs, strict=True):
        rules[f"{path}/{part}/kernel"] = Rule(
            {f"{name}.weight": (width, width)},
            lambda array: array.T.reshape(width, *heads),
            "transposed, split into heads",
        )
        if qkv_bias:
            rules[f"{path}/{part}/bias"] = Rule(
                {f"{name}.bias": (width,)},
                lambda array: array.reshape(heads),
                "split into heads",
            )
    rules[f"{path}/output/kernel"] = Rule(
        {f"{output}.weight": (width, width)},
        lambda array: array.T.reshape(*heads, width),
        "transposed, split into heads",
    )
    return rules | {f"{path}/output/bias": same(f"{output}.bias", width)}


def patch_embedding(
    name: str, channels: int, patch_size: int, width: int, *, bias: bool = True
) -> dict[str, Rule]:
    """The convolution over patches that do not overlap, as a product."""
    shape = (width, channels, patch_size, patch_size)
    rules = {
        "embedding/projection/kernel": Rule(
            {f"{name}.weight": shape},
            lambda array: array.transpose(2, 3, 1, 0).reshape(-1, width),
            "pixels of a patch flattened",
        )
    }
    if bias:
        rules["embedding/projection/bias"] = same(f"{name}.bias", width)
    return rules


def tokens(
    positions: str,
    extra: Mapping[str, str],
    grid: tuple[int, int],
    width: int,
    *,
    batch: bool = True,
) -> dict[str, Rule]:
    """Learned positions of patches, and extra tokens with their positions added.

    Args:
      positions: Name of the positions, those of the extra tokens first.
      extra: Path -> name of each extra token, in the order of their positions.
      grid: Rows and columns of patches.
      width: Channels.
      batch: Whether the arrays have a leading axis of one.

    Returns:
      The rules.
    """
    shape = (len(extra) + grid[0] * grid[1], width)
    shape = (1, *shape) if batch else shape
    rules = {
        "positions": Rule(
            {positions: shape},
            lambda array: array.reshape(-1, width)[len(extra) :].reshape(*grid, width),
            "in their grid",
        )
    }
    for index, (path, name) in enumerate(extra.items()):
        rules[path] = Rule(
            {name: (1, 1, width) if batch else (width,), positions: shape},
            lambda token, array, index=index: (
                token.reshape(1, width) + array.reshape(-1, width)[index]
            ),
            "with its position",
        )
    return rules
