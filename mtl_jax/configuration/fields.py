"""Fields of a config by their dotted paths: set, checked, built."""

import ast
import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fiddle as fdl

FLOAT32_MAX = 3.4028234663852886e38
MAX_DEPTH = 60


def build(config: fdl.Config) -> Any:
    """The experiment of a config.

    Raises:
      ValueError: If a required field is missing, a value is of the wrong type or not
        finite, or a constructor rejects it; the message names the field.
    """
    for path, value, expected in leaves(config):
        if _is_plain(expected):
            _checked(tuple(value) if isinstance(value, list) else value, expected, path)
        _check_numbers(value, path)
    try:
        return fdl.build(config)
    except Exception as error:  # whatever a class or function raises for its arguments
        # Fiddle puts the path of what it builds behind the message, among much else.
        found = re.search(r" at <root>(\S*) with", getattr(error, "proxy_message", ""))
        path = re.sub(r"\['?|'?\]", ".", found[1]).replace("..", ".") if found else ""
        reason = getattr(error, "proxy_base_exception", error)
        expected = isinstance(reason, ImportError | OSError | TypeError | ValueError)
        kind = "" if expected else f"{type(reason).__name__}: "
        raise ValueError(
            f"{path.strip('.') or 'the config'}: {kind}{reason}"
        ) from error


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
        return [str(key) for key in node]
    if isinstance(node, Sequence) and not isinstance(node, str):
        names = [getattr(item, "name", None) for item in node]
        return [n if isinstance(n, str) else str(i) for i, n in enumerate(names)]
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
    items = [*node.values()] if isinstance(node, Mapping) else node
    return items[names.index(part)]


def _assign(node: Any, name: str, text: str, path: str) -> None:
    names = _names(node)
    if name not in names:
        raise _unknown(name, path.rpartition(".")[0], names)
    value = _parsed(text)
    if isinstance(node, Mapping):
        key = [*node][names.index(name)]
        typing.cast(dict, node)[key] = _checked(value, type(node[key]), path)
    elif isinstance(node, fdl.Buildable):
        hints = _hints(fdl.get_callable(node))
        value = _checked(value, hints.get(name, Any), path)
        _check_numbers(value, path)
        setattr(node, name, value)
    else:
        raise ValueError(f"{path} names an item of a sequence; set a field of it")


def _parsed(text: str) -> Any:
    """The value of a Python literal, or else the text itself."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.literal_eval(text)
    # The last two are what Python raises for brackets within brackets without end.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


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
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{path} is {short(value)}; it must be finite") from error
    described = getattr(expected, "__name__", None) or str(expected)
    if typing.get_origin(expected) is not None:
        described = str(expected).replace("typing.", "")
    raise ValueError(
        f"{path} is {short(value)} of type {type(value).__name__}; it must be "
        f"{described}"
    )


def _check_numbers(value: Any, path: str) -> None:
    """Refuses numbers that arrays and JSON cannot hold."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, list | tuple):
            _check_numbers(number, path)
        elif isinstance(number, float) and not abs(number) <= FLOAT32_MAX:
            limit = f"less than {FLOAT32_MAX:.2g}, as numbers have 32 bits"
            must = limit if math.isfinite(number) else "finite"
            raise ValueError(f"{path} is {short(value)}; it must be {must}")
        elif isinstance(number, int) and abs(number) >= 2**63:
            raise ValueError(
                f"{path} is {short(value)}; it must be less than 2**63, as numbers "
                "have 64 bits"
            )


def short(value: Any) -> str:
    """What a value is, in a line that is never long."""
    try:
        text = repr(value)
    except ValueError:
        # Python does not write integers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


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
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType, tuple):
        return all(_is_plain(item) for item in arguments if item is not ...)
    plain = (bool, int, float, str, tuple, None, type(None))
    return expected in plain or origin is typing.Literal


def _items_fit(items: tuple, expected: tuple) -> bool:
    if not expected:
        return True
    if expected[-1] is Ellipsis:
        return all(_fits(item, expected[0]) for item in items)
    return len(items) == len(expected) and all(map(_fits, items, expected))


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


def leaves(config: fdl.Config) -> Iterator[tuple[str, Any, Any]]:
    """Path, value and expected type of every field, defaults included.

    A field that is itself configured has its function or class for a value. A default
    may be of any type.

    Raises:
      ValueError: If the config contains itself.
    """
    _check_ends(config, "", ())
    yield from _leaves(config, "")


def _check_ends(node: Any, path: str, above: tuple[int, ...]) -> None:
    """Refuses a config that contains itself somewhere."""
    if isinstance(node, fdl.Buildable):
        items = dict(fdl.ordered_arguments(node))
    elif isinstance(node, Mapping):
        items = node
    elif isinstance(node, list | tuple):
        items = dict(enumerate(node))
    else:
        return
    if id(node) in above or len(above) > MAX_DEPTH:
        raise ValueError(
            f"{path} contains what it is part of, or is nested more than {MAX_DEPTH} "
            "deep; mend the config"
        )
    for name, item in items.items():
        _check_ends(item, f"{path}.{name}" if path else str(name), (*above, id(node)))


def _leaves(
    node: Any, path: str, expected: Any = Any
) -> Iterator[tuple[str, Any, Any]]:
    prefix = f"{path}." if path else ""
    if _is_plain(expected):
        # Whatever is there is checked as a whole.
        yield path, node, expected
    elif isinstance(node, fdl.Buildable):
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
