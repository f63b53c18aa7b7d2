"""Parameters that go from one model to another, and an account of which did."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from mtl_jax.layers.patch import resize_positions
from mtl_jax.sharding.distributed import is_main
from mtl_jax.sharding.rules import path_name

NAMED = 3
"""How many parameters of each kind an account names."""


def transfer(
    params: PyTree,
    saved: PyTree,
    *,
    rules: Sequence[tuple[str, str | None]],
) -> Any:
    """Parameters of another model, placed by ordered rules.

    For `mtl_jax.train.start_from.start_from`, as a partial with ``rules``. For every
    parameter the first rule holds whose first part is its path, or the beginning of it
    up to a ``/``; the empty one is the beginning of all. The second part takes its
    place and gives the path in the other model, and None leaves the parameter fresh, as
    do rules that do not speak of it. With ``(("heads/left", "heads/digit"), ("heads",
    None), ("", ""))`` the head of ``left`` starts as that of ``digit``, other heads
    fresh, and the trunk as the other trunk.

    Learned positions (``positions``) of another grid are resized.

    Args:
      params: Fresh parameters ``{"trunk": ..., "heads": ...}``.
      saved: Those of the other model.
      rules: Pairs of paths, parts joined by ``/``.

    Returns:
      Parameters of the shapes and types of ``params``.

    Raises:
      ValueError: If a rule leads to a parameter that the other model lacks or that is
        of another shape, or speaks of no parameter at all.
    """
    there = dict(_leaves(saved))
    used: set[str] = set()

    def place(path: tuple, leaf: Any) -> Any:
        name = path_name(path)
        for beginning, source in rules:
            rest = _rest(name, beginning)
            if rest is None:
                continue
            used.add(beginning)
            if source is None:
                return leaf
            origin = "/".join(part for part in (source, rest) if part)
            if origin not in there:
                raise ValueError(
                    f"by the rule {(beginning, source)!r}, {name} starts as {origin}, "
                    "which the other model lacks; give it a rule of its own before, "
                    "such as one to None"
                )
            return _fitted(name, leaf, origin, there[origin])
        return leaf

    made = jax.tree_util.tree_map_with_path(place, params)
    unused = [beginning for beginning, _ in rules if beginning not in used]
    if unused:
        raise ValueError(
            f"the rule of {unused[0]!r} holds for no parameter; the first parts of "
            f"rules are the beginnings of paths such as {_leaves(params)[0][0]}, the "
            "narrower before the wider"
        )
    return made


def account(fresh: PyTree, saved: PyTree, made: PyTree) -> list[str]:
    """Which parameters a model starts from, a line a kind.

    Args:
      fresh: The model's own fresh parameters.
      saved: Parameters of the other model.
      made: What was made of both; leaves of ``fresh`` that stayed are the same objects.

    Returns:
      At most five lines.
    """
    there = {name: tuple(leaf.shape) for name, leaf in _leaves(saved)}
    own = dict(_leaves(fresh))
    kinds: dict[str, list[str]] = {
        "as they are": [],
        "of another shape": [],
        "made of those of other names": [],
        "stay fresh": [],
    }
    for name, leaf in _leaves(made):
        if leaf is own.get(name):
            kinds["stay fresh"].append(name)
        elif name not in there:
            kinds["made of those of other names"].append(name)
        elif there[name] != tuple(leaf.shape):
            change = f"{name} {there[name]} -> {tuple(leaf.shape)}"
            kinds["of another shape"].append(change)
        else:
            kinds["as they are"].append(name)
    left = [name for name in there if name not in own]
    kinds["of the other model, without a place of that name"] = left
    return [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]


def print_account(origin: str, fresh: PyTree, saved: PyTree, made: PyTree) -> None:
    """Prints the `account`, by one process and not where shapes alone are computed.

    Args:
      origin: Where the other parameters are from.
      fresh: See `account`.
      saved: See `account`.
      made: See `account`.
    """
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(fresh))
    if is_main() and not traced:
        print("\n  ".join([f"parameters from {origin}", *account(fresh, saved, made)]))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} ({', '.join(names[:NAMED])}{more})"


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _rest(name: str, beginning: str) -> str | None:
    """What follows the beginning of a path, None if it begins otherwise."""
    if not beginning:
        return name
    if name == beginning:
        return ""
    return (
        name.removeprefix(f"{beginning}/") if name.startswith(f"{beginning}/") else None
    )


def _fitted(name: str, fresh: Any, origin: str, leaf: Any) -> Any:
    is_grid = name.rpartition("/")[2] == "positions" and leaf.ndim == fresh.ndim == 3
    if is_grid and leaf.shape[2] == fresh.shape[2]:
        return resize_positions(jnp.asarray(leaf), *fresh.shape[:2]).astype(fresh.dtype)
    if leaf.shape != fresh.shape:
        raise ValueError(
            f"{name} is {tuple(fresh.shape)}, and {origin} of the other model "
            f"{tuple(leaf.shape)}; make them the same, or give it a rule of its own "
            "before, such as one to None"
        )
    return leaf.astype(fresh.dtype)
