"""Saved configs that may come from someone else: what they may name and hold.

A document is looked through before Fiddle makes anything of it, so that reading it
calls nothing: it holds plain values, configs and partials, and names of what these
call. What is named is imported only from trusted modules. Building the config calls it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import fiddle as fdl
from fiddle.experimental import serialization

from mtl_jax.configuration.fields import MAX_DEPTH
from mtl_jax.configuration.modules import run_as_import

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
    "flax.linen",
    "jax.numpy",
    "optax",
)
"""Modules whose public symbols a saved config may name without being told to.

Of Flax only its modules, and of ``jax.numpy`` only its types.
"""

# These have functions that read any file, or take time, and no place in a config.
_UNTRUSTED = ("mtl_jax.models.inference", "mtl_jax.models.pretrained.files")

_METADATA = "fiddle._src.config", "BuildableTraverserMetadata"
_CONTAINERS = {
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "tuple"),
    ("fiddle._src.config", "Config"),
    ("fiddle._src.partial", "ArgFactory"),
    ("fiddle._src.partial", "Partial"),
    _METADATA,
}

MAX_BYTES = 64 * 2**20
MAX_VALUES = 100_000

# What Fiddle raises for documents that it cannot read.
_UNREADABLE = (
    *(serialization.DeserializationError, ArithmeticError, AssertionError),
    *(AttributeError, ImportError, LookupError, RecursionError, TypeError, ValueError),
)

# Paths that libraries of file systems take for addresses.
_ADDRESS = re.compile(r"(?i)[a-z][a-z0-9+.-]*://")
_REMOTE_ROOTS = ("gs", "s3", "az", "hf")


def read_document(path: Path) -> dict[str, Any]:
    """What `to_document` made, from a file.

    Raises:
      ValueError: If the file is not a JSON object, or larger than any config.
      OSError: If it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, more than any config; give the config.json of "
            "a run"
        )
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); give the config.json of a run"
        ) from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a JSON object; give the config.json of a run")
    return document


def from_document(document: Mapping[str, Any], trust: Sequence[str] = ()) -> fdl.Config:
    """The config of a saved document.

    A saved config may come from someone else, so it may name only what is in trusted
    packages; nothing else is imported.

    Args:
      document: From `to_document`.
      trust: Further packages whose symbols it may name. The path of a ``.py`` file
        stands for its module. An address such as ``gs://bucket`` stands for all that
        begins so: others are refused, as sources of data would connect to them.

    Returns:
      The config.

    Raises:
      ValueError: If it names something else, or cannot be read.
    """
    files = [name for name in trust if name.endswith(".py")]
    packages = [name for name in trust if name not in files]
    for name in files:
        if not Path(name).is_file():
            raise ValueError(f"--trust {name}: there is no such file")
        packages.append(run_as_import(Path(name)))
    try:
        saved = document["fiddle"]
        _Check(saved["objects"], trust).values(saved["root"])
        config = serialization.load_json(json.dumps(saved), _Policy(packages))
    except UntrustedError:
        raise
    except serialization.PyrefPolicyError as error:
        raise _untrusted(error.module, error.symbol) from error
    except ModuleNotFoundError as error:
        name = getattr(error, "proxy_base_exception", error).name
        raise ValueError(
            f"config.json names the module {name}, which cannot be found; if it is "
            f"your own, give --trust the path of its file, as in {name}.py"
        ) from error
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise ValueError(
            f"config.json cannot be read ({reason}); restore it, or train again"
        ) from error
    if not isinstance(config, fdl.Config):
        raise ValueError("config.json holds no config; restore it, or train again")
    return config


class UntrustedError(ValueError):
    """A saved config names what it should not."""


def _untrusted(module: str, symbol: str) -> UntrustedError:
    return UntrustedError(
        f"config.json names {module}.{symbol}, which is not in a trusted module; if it "
        f"is your own and you trust it, add --trust {module}, or the path of its file"
    )


class _Policy(serialization.PyrefPolicy):
    """Which symbols a document may name.

    Args:
      packages: Those that the user trusts, besides ours.
    """

    def __init__(self, packages: Sequence[str]):
        self._packages = tuple(packages)

    def allows_import(self, module: str, symbol: str) -> bool:
        # What is inside a class, such as a method, is nothing to configure.
        if "." in symbol:
            return False
        if (module, symbol) in _CONTAINERS or _within(module, self._packages):
            return True
        # Libraries have their tests beside them.
        tests = any(part.endswith("_test") for part in module.split("."))
        return (
            _within(module, TRUSTED_MODULES)
            and not _within(module, _UNTRUSTED)
            and not tests
            and not symbol.startswith("_")
        )

    def allows_value(self, value: Any) -> bool:
        # A trusted module also holds the names that it imports from others.
        module = getattr(value, "__module__", "")
        name = getattr(value, "__qualname__", "")
        if not callable(value) or not self.allows_import(module, name):
            return False
        if _within(module, self._packages):
            return True
        if _within(module, ["jax.numpy"]):
            # Some of its functions read (pickled) files.
            return hasattr(value, "dtype")
        if _within(module, ["flax.linen"]) and module != "flax.linen.activation":
            return isinstance(value, type) and hasattr(value, "apply")
        return True


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in packages)


class _Check:
    """Looks a document through for all but names, which `_Policy` knows.

    Fiddle would call what is named as the type of a tuple with names, follow
    references without end, and repeat what is referred to again and again.

    Args:
      objects: What can be referred to.
      trust: Addresses that may be named, among others.
    """

    def __init__(self, objects: Mapping[str, Any], trust: Sequence[str]):
        self._objects = objects
        self._trust = trust
        self._counted: dict[str, int] = {}

    def values(self, node: Any, depth: int = 0) -> int:
        """How many values a node has, referred to ones counted each time.

        Raises:
          ValueError: If it is not made as Fiddle makes it, or has too many.
        """
        if depth > MAX_DEPTH:
            raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
        if isinstance(node, list):
            return self._sum(node, depth)
        if not isinstance(node, dict):
            self._check_address(node)
            return 1
        kind = node["type"]
        if kind == "ref":
            return self._referred(node["key"], depth)
        if kind == "pyref":
            return 1
        if kind == "leaf":
            if isinstance(node["value"], dict | list):
                raise ValueError("a plain value of it is none")
            return self.values(node["value"], depth)
        name = (kind["module"], kind["name"])
        if name not in _CONTAINERS:
            raise _untrusted(*name)
        items = [item for _, item in node["items"]]
        metadata = node["metadata"]
        if name == _METADATA:
            if (metadata["module"], metadata["name"]) != name:
                raise _untrusted(metadata["module"], metadata["name"])
            return self._sum(items, depth)
        return self._sum([*items, metadata], depth)

    def _sum(self, nodes: Sequence[Any], depth: int) -> int:
        total = 1
        for node in nodes:
            total += self.values(node, depth + 1)
            if total > MAX_VALUES:
                raise ValueError(f"it has more than {MAX_VALUES:,} values")
        return total

    def _referred(self, key: str, depth: int) -> int:
        if key not in self._counted:
            # Found again while it is counted, it goes round until it is too deep.
            self._counted[key] = self.values(self._objects[key], depth + 1)
        return self._counted[key]

    def _check_address(self, value: Any) -> None:
        if not isinstance(value, str):
            return
        root, *parts = PurePosixPath(value).parts or ("",)
        remote = root == "/" and parts and parts[0] in _REMOTE_ROOTS
        if not _ADDRESS.match(value) and not remote:
            return
        if not value.startswith(tuple(a for a in self._trust if _ADDRESS.match(a))):
            raise UntrustedError(
                f"config.json names the address {value!r}, which may be connected to; "
                f"if you trust it, add --trust {value}"
            )
