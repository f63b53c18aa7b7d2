"""Configs by their names: those that ship, Python files, and those of runs."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl

from mtl_jax.configuration.modules import explained, module_of
from mtl_jax.configuration.trust import from_document, read_document


def config_folder() -> Path:
    """The folder of the configs that ship with the project."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def known_configs() -> list[str]:
    """Names of the configs that ship with the project."""
    return sorted(
        path.stem for path in config_folder().glob("*.py") if path.stem[0] != "_"
    )


def load_config(
    name: str, *, smoke: bool = False, trust: Sequence[str] = ()
) -> fdl.Config:
    """The config of a name.

    Args:
      name: ``config`` or ``config:variant``, where ``config`` is one that ships with
        the project or the path of a Python file; or the path of a run's
        ``config.json``.
      smoke: Whether to shrink it to a few small steps.
      trust: What a ``config.json`` may name besides what is trusted; see
        `from_document`.

    Returns:
      The config of an experiment.

    Raises:
      ValueError: If there is no such config or variant; the message lists the known.
    """
    if name.endswith(".json"):
        return _load_saved(Path(name), smoke, trust)
    stem, _, variant = name.partition(":")
    path = Path(stem) if stem.endswith(".py") else config_folder() / f"{stem}.py"
    if not path.is_file():
        raise ValueError(
            f"unknown config {stem!r}; the known ones are "
            f"{', '.join(known_configs())}, or give the path of a .py file, or of a "
            "run's config.json"
        )
    if stem.endswith(".py") and (entry := str(path.parent.resolve())) not in sys.path:
        # Lets modules be found beside it, as Python does beside a script.
        sys.path.insert(0, entry)
    module, run = module_of(path, f"mtl_jax_config_{path.stem}")
    with _explained(path):
        run(module)
    variants: Any = getattr(module, "VARIANTS", None)
    if not variants or not isinstance(variants, Mapping):
        raise ValueError(
            f"{path} is no config: it needs a dict VARIANTS from names to functions"
        )
    named = {str(key): make for key, make in variants.items()}
    variant = variant or next(iter(named))
    if variant not in named:
        raise ValueError(
            f"config {stem!r} has no variant {variant!r}; its variants are "
            f"{', '.join(named)}"
        )
    with _explained(path):
        config = named[variant]()
    if not isinstance(config, fdl.Config):
        raise ValueError(
            f"variant {variant!r} of {path} returns a {type(config).__name__}; it must "
            "return an fdl.Config of an experiment"
        )
    if smoke:
        if not hasattr(module, "smoke"):
            raise ValueError(
                f"{path} cannot be shrunk by --smoke: it has no function smoke(config)"
            )
        with _explained(path):
            module.smoke(config)
    return config


def _explained(path: Path) -> contextlib.AbstractContextManager:
    """What says where a config of the user's failed; in ours, that is our fault."""
    return (
        contextlib.nullcontext() if path.parent == config_folder() else explained(path)
    )


def _load_saved(path: Path, smoke: bool, trust: Sequence[str]) -> fdl.Config:
    if not path.is_file():
        raise ValueError(
            f"unknown config {str(path)!r}: there is no such file; give the "
            "config.json of a run"
        )
    if smoke:
        raise ValueError(
            f"{path} cannot be shrunk by --smoke, as it has no function for that; set "
            "its sizes by --set"
        )
    return from_document(read_document(path), trust)


def full_name(name: str) -> str:
    """The name of a config with its variant spelt out.

    That of a run's ``config.json`` is the name of the run's folder: what is written
    in a file may come from someone else, and folders are named after configs.
    """
    if name.endswith(".json"):
        return Path(name).resolve().parent.name or Path(name).stem
    stem, _, variant = name.partition(":")
    return f"{Path(stem).stem}:{variant}" if variant else Path(stem).stem
