"""Named arrays and JSON in local files; nothing in them is ever executed."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mtl_jax.archives import read_npz

MAX_JSON_BYTES = 64 * 2**20

Arrays = Mapping[str, np.ndarray]
"""Names -> arrays, as published."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack")


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The named arrays of a file.

    Args:
      path: A ``.safetensors`` or ``.npz`` file, or a folder that holds
        ``model.safetensors``, whole or in parts with their index.

    Returns:
      The arrays, in their own types.

    Raises:
      ValueError: If it is a pickle, which could run any code, or of another kind, or
        damaged, or if the ``safetensors`` package is missing.
      OSError: If there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in _PICKLES:
        raise ValueError(_no_pickle(path))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a .safetensors or .npz file, or a folder "
            "with model.safetensors"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise ValueError(
        f"{path} is of an unknown kind; give a .safetensors or .npz file, or a folder "
        "with model.safetensors"
    )


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names a file in what its content makes fail, whatever stands in it.

    Raises:
      ValueError: For every error that is raised inside.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, ValueError)
        kind = "" if known else f"has what no such file has ({type(error).__name__}) "
        raise ValueError(f"{path}: {kind}{error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: If the file holds something else.
      OSError: If there is no such file.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, more than any such file; "
            "restore it from where it was published"
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no JSON ({error}); restore it from where it was published"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; restore it")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def folder_of(path: str | Path) -> Path:
    """The folder of a file, or the path itself if that is one."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if whole.is_file():
        return _read_safetensors(whole)
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index} has no weight_map; restore it")
        arrays = {}
        if not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index} has a weight_map without names; restore it")
        for name in sorted(set(places.values())):
            # Parts lie beside their index, wherever a foreign one may point.
            part = folder / Path(name.replace("\0", "")).name
            if not part.is_file():
                raise FileNotFoundError(
                    f"{part} does not exist, but {index} names it; restore it"
                )
            arrays |= _read_safetensors(part)
        return arrays
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLES:
            raise ValueError(_no_pickle(path))
    raise FileNotFoundError(
        f"{folder} holds no model.safetensors; save the model there in that format"
    )


def _no_pickle(path: Path) -> str:
    return (
        f"{path} may run code when it is read, so it is not; take the safetensors file "
        "that is published with it, or convert it where you trust it, with "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), "
        '"model.safetensors")'
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        import safetensors
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs the safetensors package; install it with "
            "pip install 'mtl_jax[pretrained]'"
        ) from error
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        # Besides its own error the package raises what NumPy does for unknown types.
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{path} is damaged ({reason}); restore it from where it was published"
        ) from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise ValueError(f"{error}; restore it, or save its arrays alone") from error
    return {name: _recover_bfloat16(array) for name, array in arrays.items()}


def _recover_bfloat16(array: np.ndarray) -> np.ndarray:
    # NumPy's format has no such type and calls it raw bytes.
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return array.view(jnp.bfloat16)
    return array
