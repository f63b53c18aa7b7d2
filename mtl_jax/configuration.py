"""Configs: found by name, changed from the command line, saved as JSON.

A config file is Python with a dict ``VARIANTS`` from variant names to functions that
return a `fiddle.Config` of an `mtl_jax.train.Experiment` (the first one is the
default), and a function ``smoke`` that shrinks such a config to a few small steps.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
from fiddle.experimental import serialization

TRUSTED_MODULES = (
    "mtl_jax.data.mixture",
    "mtl_jax.data.sources",
    "mtl_jax.data.transforms",
    "mtl_jax.layers",
    "mtl_jax.models",
    "mtl_jax.optim",
    "mtl_jax.sharding.rules",
    "mtl_jax.tasks",
    "mtl_jax.train.experiment",
    "mtl_jax.train.optimizer",
    "fiddle._src.config",
    "fiddle._src.partial",
    "flax.linen",
    "jax.numpy",
    "optax",
)
"""Modules whose symbols a saved config may name without being told to."""

_BUILTINS = ("tuple", "list", "dict", "NoneType")


def config_folder() -> Path:
    """The folder of the configs that ship with the project."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def known_configs() -> list[str]:
    """Names of the configs that ship with the project."""
    return sorted(
        path.stem for path in config_folder().glob("*.py") if path.stem[0] != "_"
    )


def load_config(name: str, *, smoke: bool = False) -> fdl.Config:
    """The config of a name.

    Args:
      name: ``config`` or ``config:variant``, where ``config`` is one that ships with
        the project or the path of a Python file.
      smoke: Whether to shrink it to a few small steps.

    Returns:
      The config of an experiment.

    Raises:
      ValueError: If there is no such config or variant; the message lists the known.
    """
    stem, _, variant = name.partition(":")
    path = Path(stem) if stem.endswith(".py") else config_folder() / f"{stem}.py"
    if not path.is_file():
        raise ValueError(
            f"unknown config {stem!r}; the known ones are "
            f"{', '.join(known_configs())}, or give the path of a .py file"
        )
    specification = importlib.util.spec_from_file_location(
        f"mtl_jax_config_{path.stem}", path
    )
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    variants: Mapping[str, Any] = getattr(module, "VARIANTS", None) or {}
    if not variants:
        raise ValueError(
            f"{path} is no config: it needs a dict VARIANTS from names to functions"
        )
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise ValueError(
            f"config {stem!r} has no variant {variant!r}; its variants are "
            f"{', '.join(variants)}"
        )
    config = variants[variant]()
    if smoke:
        if not hasattr(module, "smoke"):
            raise ValueError(
                f"{path} cannot be shrunk by --smoke: it has no function smoke(config)"
            )
        module.smoke(config)
    return config


def full_name(name: str) -> str:
    """The name of a config with its variant spelt out."""
    stem, _, variant = name.partition(":")
    return f"{Path(stem).stem}:{variant}" if variant else Path(stem).stem


def build(config: fdl.Config) -> Any:
    """The experiment of a config.

    Raises:
      ValueError: If a required field is missing or a constructor rejects its values.
    """
    try:
        return fdl.build(config)
    except (ImportError, TypeError) as error:
        raise ValueError(str(error)) from error


def override(config: fdl.Config, assignments: Sequence[str]) -> None:
    """Sets fields of a config in place.

    Args:
      config: The config.
      assignments: Strings ``path=value``. A path is dotted; an item of a sequence is
        named by its ``name``, or its index if it has none. A value is a Python
        literal or else a string.

    Raises:
      ValueError: If a path or a value does not fit; the message names the nearest.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} is not of the form path=value")
        *parents, last = path.split(".")
        node: Any = config
        for depth, part in enumerate(parents):
            node = _child(node, part, ".".join(parents[:depth]))
        _assign(node, last, text, path)


def _names(node: Any) -> list[str]:
    if isinstance(node, fdl.Buildable):
        function = fdl.get_callable(node)
        parameters = inspect.signature(function).parameters
        return [n for n in parameters if n not in ("parent", "name")] + (
            ["name"] if "name" in parameters and not _is_module(function) else []
        )
    if isinstance(node, Mapping):
        return list(node)
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [getattr(item, "name", str(i)) for i, item in enumerate(node)]
    return []


def _is_module(function: Any) -> bool:
    return hasattr(function, "apply") and hasattr(function, "init")


def _unknown(part: str, parent: str, names: Sequence[str]) -> ValueError:
    nearest = difflib.get_close_matches(part, names, n=1, cutoff=0.0)
    hint = (
        f"; did you mean {nearest[0]!r}? Its fields: {', '.join(names)}"
        if nearest
        else ": it has no fields; set it as a whole"
    )
    where = f"{parent!r} has" if parent else "the config has"
    return ValueError(f"{where} no field {part!r}{hint}")


def _child(node: Any, part: str, parent: str) -> Any:
    names = _names(node)
    if part not in names:
        raise _unknown(part, parent, names)
    if isinstance(node, fdl.Buildable):
        return getattr(node, part)
    if isinstance(node, Mapping):
        return node[part]
    return node[names.index(part)]


def _assign(node: Any, name: str, text: str, path: str) -> None:
    names = _names(node)
    if name not in names:
        raise _unknown(name, path.rpartition(".")[0], names)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(node, Mapping):
        expected = type(node[name])
        typing.cast(dict, node)[name] = _checked(value, expected, path)
    elif isinstance(node, fdl.Buildable):
        hints = _hints(fdl.get_callable(node))
        setattr(node, name, _checked(value, hints.get(name, Any), path))
    else:
        raise ValueError(f"{path} names an item of a sequence; set a field of it")


def _hints(function: Any) -> dict[str, Any]:
    target = function.__init__ if not inspect.isclass(function) else function
    try:
        return typing.get_type_hints(target if inspect.isclass(function) else function)
    except NameError:
        return {}


def _checked(value: Any, expected: Any, path: str) -> Any:
    """``value`` as ``expected``, or an error."""
    if _fits(value, expected):
        return value
    if _fits(1.0, expected) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    described = getattr(expected, "__name__", None) or str(expected)
    if typing.get_origin(expected) is not None:
        described = str(expected).replace("typing.", "")
    raise ValueError(
        f"{path} is {value!r} of type {type(value).__name__}; it must be {described}"
    )


def _fits(value: Any, expected: Any) -> bool:
    if expected is Any:
        return True
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if expected in (None, type(None)):
        return value is None
    if origin is tuple or expected is tuple:
        return isinstance(value, tuple) and _items_fit(value, arguments)
    if expected is bool or isinstance(value, bool):
        return expected is bool and isinstance(value, bool)
    if expected in (int, float, str):
        return type(value) is expected
    return False


def _items_fit(items: tuple, expected: tuple) -> bool:
    if not expected:
        return True
    if expected[-1] is Ellipsis:
        return all(_fits(item, expected[0]) for item in items)
    return len(items) == len(expected) and all(map(_fits, items, expected))


def to_document(config: fdl.Config, name: str) -> dict[str, Any]:
    """A config as JSON: readable fields, and what rebuilds it exactly.

    Args:
      config: The config.
      name: What it is called.

    Returns:
      ``config`` (its name), ``fields`` (dotted path -> value, defaults included, and
      path -> name of the function or class for whatever is itself configured) and
      ``fiddle`` (Fiddle's own serialization).
    """
    return {
        "config": full_name(name),
        "fields": dict(_flatten(config, "")),
        "fiddle": json.loads(serialization.dump_json(config)),
    }


def _value(node: fdl.Buildable, name: str) -> Any:
    """A field as set or by default; Fiddle gives no default made by a factory."""
    if name in fdl.ordered_arguments(node):
        return getattr(node, name)
    function: Any = fdl.get_callable(node)
    default = inspect.signature(function).parameters[name].default
    if dataclasses.is_dataclass(function):
        for field in dataclasses.fields(function):
            if field.name == name and field.default_factory is not dataclasses.MISSING:
                return field.default_factory()
    return default


def _flatten(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    prefix = f"{path}." if path else ""
    if isinstance(node, fdl.Buildable):
        function = fdl.get_callable(node)
        if path:
            yield path, f"{function.__module__}.{function.__qualname__}"
        for name in _names(node):
            yield from _flatten(_value(node, name), prefix + name)
    elif isinstance(node, Mapping):
        for name, item in node.items():
            yield from _flatten(item, f"{prefix}{name}")
    elif isinstance(node, list | tuple) and any(
        isinstance(item, fdl.Buildable) for item in node
    ):
        for name, item in zip(_names(node), node, strict=True):
            yield from _flatten(item, f"{prefix}{name}")
    else:
        yield path, _readable(node)


def _readable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return f"{value.__module__}.{name}" if name else repr(value)


class _TrustedPackages(serialization.PyrefPolicy):
    def __init__(self, packages: Sequence[str]):
        self._packages = tuple(packages)

    def allows_import(self, module: str, symbol: str) -> bool:
        if module == "builtins":
            return symbol in _BUILTINS
        # What is inside a class, such as a method, is nothing to configure.
        return "." not in symbol and any(
            f"{module}.".startswith(f"{name}.") for name in self._packages
        )

    def allows_value(self, value: Any) -> bool:
        # A trusted module also holds the names that it imports from others.
        module = getattr(value, "__module__", "")
        name = getattr(value, "__qualname__", "")
        if module == "jax.numpy" and not isinstance(value, type):
            # Of its symbols only dtypes: some of its functions read (pickled) files.
            return False
        return callable(value) and self.allows_import(module, name)


def from_document(document: Mapping[str, Any], trust: Sequence[str] = ()) -> fdl.Config:
    """The config of a saved document.

    A saved config may come from someone else, so it may name only what is in trusted
    packages; nothing else is imported.

    Args:
      document: From `to_document`.
      trust: Further packages whose symbols it may name.

    Returns:
      The config.

    Raises:
      ValueError: If it names something else, or cannot be read.
    """
    policy = _TrustedPackages((*TRUSTED_MODULES, *trust))
    try:
        return serialization.load_json(json.dumps(document["fiddle"]), policy)
    except serialization.PyrefPolicyError as error:
        raise ValueError(
            f"config.json names {error.module}.{error.symbol}, which is not in a "
            f"trusted module ({', '.join(TRUSTED_MODULES)}); if it is your own and you "
            f"trust it, add --trust {error.module}"
        ) from error
    except (KeyError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise ValueError(f"config.json cannot be read: {error}") from error


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines ``path: saved -> wanted`` for the fields in which two documents differ."""
    old, new = saved.get("fields") or {}, json.loads(json.dumps(wanted["fields"]))
    return [
        f"{path}: {old.get(path, '(unset)')!r} -> {new.get(path, '(unset)')!r}"
        for path in sorted({*old, *new})
        if old.get(path, ...) != new.get(path, ...)
    ]
