"""Configs: found by name, changed from the command line, saved as JSON.

A config file is Python with a dict ``VARIANTS`` from variant names to functions that
return a `fiddle.Config` of an `mtl_jax.train.Experiment` (the first one is the
default), and a function ``smoke`` that shrinks such a config to a few small steps.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
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
    "mtl_jax.train.start_from",
    "fiddle._src.config",
    "fiddle._src.partial",
    "flax.linen",
    "jax.numpy",
    "optax",
)
"""Modules whose symbols a saved config may name without being told to."""

# What Fiddle raises for values that it cannot write, and documents that it cannot read.
_UNSERIALIZABLE = serialization.UnserializableValueError, AttributeError, ImportError
_UNREADABLE = (
    *(serialization.DeserializationError, ArithmeticError, AttributeError, ImportError),
    *(LookupError, RecursionError, TypeError, ValueError),
)

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
    if stem.endswith(".py"):
        _make_importable(path.parent)
    specification = importlib.util.spec_from_file_location(
        f"mtl_jax_config_{path.stem}", path
    )
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    with _explained(path):
        specification.loader.exec_module(module)
    variants: Any = getattr(module, "VARIANTS", None)
    if not variants or not isinstance(variants, Mapping):
        raise ValueError(
            f"{path} is no config: it needs a dict VARIANTS from names to functions"
        )
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise ValueError(
            f"config {stem!r} has no variant {variant!r}; its variants are "
            f"{', '.join(variants)}"
        )
    with _explained(path):
        config = variants[variant]()
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


def _make_importable(folder: Path) -> None:
    """Lets modules be found in a folder, as Python does for that of a script."""
    if (entry := str(folder.resolve())) not in sys.path:
        sys.path.insert(0, entry)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Says where a config file of the user's went wrong."""
    try:
        yield
    except Exception as error:
        if path.parent == config_folder():
            raise
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == path.resolve()
        ]
        if isinstance(error, SyntaxError) and error.filename == str(path.resolve()):
            lines.append(error.lineno)
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ValueError(
            f"{where}: {type(error).__name__}: {error}; mend the config"
        ) from error


def full_name(name: str) -> str:
    """The name of a config with its variant spelt out."""
    stem, _, variant = name.partition(":")
    return f"{Path(stem).stem}:{variant}" if variant else Path(stem).stem


def build(config: fdl.Config) -> Any:
    """The experiment of a config.

    Raises:
      ValueError: If a required field is missing, a value is of the wrong type or not
        finite, or a constructor rejects it; the message names the field.
    """
    for path, value, expected in _leaves(config, ""):
        if _is_plain(expected):
            _checked(tuple(value) if isinstance(value, list) else value, expected, path)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{path} is {value}; it must be finite")
    try:
        return fdl.build(config)
    except (ImportError, OSError, TypeError, ValueError) as error:
        # Fiddle puts the path of what it builds behind the message, among much else.
        found = re.search(r" at <root>(\S*) with", getattr(error, "proxy_message", ""))
        path = re.sub(r"\['?|'?\]", ".", found[1]).replace("..", ".") if found else ""
        reason = getattr(error, "proxy_base_exception", error)
        raise ValueError(f"{path.strip('.') or 'the config'}: {reason}") from error


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


def _is_plain(expected: Any) -> bool:
    """Whether a type is made of numbers, strings, tuples and None alone."""
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return all(map(_is_plain, typing.get_args(expected)))
    plain = (bool, int, float, str, tuple, None, type(None))
    return expected in plain or origin in (tuple, typing.Literal)


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
    leaves = list(_leaves(config, ""))
    try:
        saved = serialization.dump_json(config)
    except _UNSERIALIZABLE as error:
        for path, value, _ in leaves:
            _check_serializable(path, value)
        raise ValueError(f"config.json cannot hold the config: {error}") from error
    return {
        "config": full_name(name),
        "fields": {path: _readable(value) for path, value, _ in leaves},
        "fiddle": json.loads(saved),
    }


def _check_serializable(path: str, value: Any) -> None:
    try:
        serialization.dump_json(value)
    except _UNSERIALIZABLE as error:
        name = getattr(value, "__qualname__", None) or repr(value)
        raise ValueError(
            f"{path} is {name}, which config.json cannot name: put functions and "
            "classes of your own at the top level of a module beside the config, not "
            "in the config itself, and import them; use fdl.Partial for "
            "functools.partial"
        ) from error


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


def _leaves(
    node: Any, path: str, expected: Any = Any
) -> Iterator[tuple[str, Any, Any]]:
    """Path, value and expected type of every field, defaults included.

    A field that is itself configured has its function or class for a value. A default
    may be of any type.
    """
    prefix = f"{path}." if path else ""
    if isinstance(node, fdl.Buildable):
        function = fdl.get_callable(node)
        if path:
            yield path, function, Any
        hints, given = _hints(function), fdl.ordered_arguments(node)
        for name in _names(node):
            hint = hints.get(name, Any) if name in given else Any
            yield from _leaves(_value(node, name), prefix + name, hint)
    elif isinstance(node, Mapping):
        for name, item in node.items():
            yield from _leaves(item, f"{prefix}{name}")
    elif isinstance(node, list | tuple) and any(
        isinstance(item, fdl.Buildable) for item in node
    ):
        for name, item in zip(_names(node), node, strict=True):
            yield from _leaves(item, f"{prefix}{name}")
    else:
        yield path, node, expected


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
      trust: Further packages whose symbols it may name. The path of a ``.py`` file
        stands for its module, which is then found in the file's folder.

    Returns:
      The config.

    Raises:
      ValueError: If it names something else, or cannot be read.
    """
    policy = _TrustedPackages((*TRUSTED_MODULES, *map(_trusted, trust)))
    try:
        config = serialization.load_json(json.dumps(document["fiddle"]), policy)
    except serialization.PyrefPolicyError as error:
        raise ValueError(
            f"config.json names {error.module}.{error.symbol}, which is not in a "
            "trusted module; if it is your own and you trust it, add --trust "
            f"{error.module}, or the path of its file"
        ) from error
    except ModuleNotFoundError as error:
        name = getattr(error, "proxy_base_exception", error).name
        raise ValueError(
            f"config.json names the module {name}, which cannot be found; if it is "
            f"your own, give --trust the path of its file, as in {name}.py"
        ) from error
    except _UNREADABLE as error:
        raise ValueError(
            f"config.json cannot be read: {error!r}; restore it, or train again"
        ) from error
    if not isinstance(config, fdl.Config):
        raise ValueError("config.json holds no config; restore it, or train again")
    return config


def _trusted(name: str) -> str:
    """A trusted module's name, given that or its file."""
    if not name.endswith(".py"):
        return name
    if not Path(name).is_file():
        raise ValueError(f"--trust {name}: there is no such file")
    _make_importable(Path(name).parent)
    return Path(name).stem


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines ``path: saved -> wanted`` for the fields in which two documents differ."""
    old, new = saved.get("fields"), json.loads(json.dumps(wanted["fields"]))
    old = old if isinstance(old, Mapping) else {}
    return [
        f"{path}: {old.get(path, '(unset)')!r} -> {new.get(path, '(unset)')!r}"
        for path in sorted({*old, *new})
        if old.get(path, ...) != new.get(path, ...)
    ]
