"""Configs as JSON: readable fields, and what rebuilds a config exactly."""

import functools
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import fiddle as fdl
from fiddle.experimental import serialization

from mtl_jax.configuration.fields import leaves, short
from mtl_jax.configuration.loading import full_name

# What Fiddle raises for values that it cannot write.
_UNSERIALIZABLE = (
    *(serialization.UnserializableValueError, AttributeError, ImportError),
    # Names that it cannot split, and what is neither a function nor a plain value.
    *(serialization.PyrefPolicyError, TypeError, ValueError, RecursionError),
)


def to_document(config: fdl.Config, name: str) -> dict[str, Any]:
    """A config as JSON: readable fields, and what rebuilds it exactly.

    Args:
      config: The config.
      name: What it is called.

    Returns:
      ``config`` (its name), ``fields`` (dotted path -> value, defaults included, and
      path -> name of the function or class for whatever is itself configured; not what
      only a call will give) and ``fiddle`` (Fiddle's own serialization).
    """
    found = list(leaves(config))
    try:
        saved = serialization.dump_json(config)
    except _UNSERIALIZABLE as error:
        for path, value, _ in found:
            _check_serializable(path, value)
        raise ValueError(f"config.json cannot hold the config: {error}") from error
    return {
        "config": full_name(name),
        "fields": {
            path: _readable(value)
            for path, value, _ in found
            if value is not inspect.Parameter.empty
        },
        "fiddle": json.loads(saved),
    }


def _check_serializable(path: str, value: Any) -> None:
    try:
        serialization.dump_json(value)
    except _UNSERIALIZABLE as error:
        name = getattr(value, "__qualname__", None) or short(value)
        raise ValueError(
            f"{path} is {name}, which config.json cannot name: put functions and "
            "classes of your own at the top level of a module beside the config, not "
            "in the config itself, and import them; use fdl.Partial for "
            "functools.partial"
        ) from error


def _readable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    if isinstance(value, functools.partial):
        given = [
            *value.args,
            *(f"{k}={_readable(v)}" for k, v in value.keywords.items()),
        ]
        return f"{_readable(value.func)}({', '.join(map(str, given))})"
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    # Where something lies in memory is different in every process.
    return (
        f"{value.__module__}.{name}"
        if name
        else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    )


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines ``path: saved -> wanted`` for the fields in which two documents differ."""
    old, new = saved.get("fields"), json.loads(json.dumps(wanted["fields"]))
    old = old if isinstance(old, Mapping) else {}
    return [
        f"{path}: {old.get(path, '(unset)')!r} -> {new.get(path, '(unset)')!r}"
        for path in sorted({*old, *new})
        if old.get(path, ...) != new.get(path, ...)
    ]
