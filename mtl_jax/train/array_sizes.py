"""What the arrays of a checkpoint take in memory, against what its files hold."""

import json
import math
import operator
import re
from pathlib import Path

import tensorstore

from mtl_jax.train.integrity import DamagedCheckpointError

SMALL = 2**26
"""Bytes that arrays may take whatever the size of the files."""

METADATA = "/zarr.json"
"""How the key of an array's metadata ends, behind the name of the array."""

PART = re.compile("/c(/[0-9]+)*$")
"""The same of a chunk."""


def check_array_sizes(folder: Path) -> None:
    """Checks that no array, nor a part that is read at once, exceeds what is there.

    The metadata of a stranger's checkpoint may claim any size for what they leave out
    or have compressed. In those that are written here, files hold every byte of every
    array.

    Args:
      folder: The checkpoint, whose files agree with its manifest.

    Raises:
      DamagedCheckpointError: If arrays are larger, or kept in another way than here.
    """
    claimed = sum(_bytes(folder, name, text) for name, text in _metadata(folder))
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if claimed > held + SMALL:
        raise DamagedCheckpointError(
            folder, f"its arrays would take {claimed:,} bytes, and its files {held:,}"
        )


def _metadata(folder: Path) -> list[tuple[str, bytes]]:
    """Name and metadata of each array."""
    state = (folder / "state").absolute()
    # Without it, arrays would be looked for in other files.
    if not (state / "manifest.ocdbt").is_file():
        raise DamagedCheckpointError(folder, "state/manifest.ocdbt is missing")
    try:
        base = {"driver": "file", "path": f"{state}/"}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        names = [key.decode() for key in store.list().result()]
        found = [name for name in names if name.endswith(METADATA)]
        reads = [store.read(name) for name in found]
        texts = [read.result().value for read in reads]
    except ValueError as error:
        raise DamagedCheckpointError(folder, "state holds no arrays") from error
    arrays = {name.removesuffix(METADATA) for name in found}
    for name in names:
        if not name.endswith(METADATA) and PART.sub("", name) not in arrays:
            raise DamagedCheckpointError(folder, f"state holds {name!r}, no array")
    return list(zip(found, texts, strict=True))


def _bytes(folder: Path, name: str, text: bytes) -> int:
    """Bytes of an array, or of its chunks if these are larger."""
    try:
        document = json.loads(text)
        kind = tensorstore.dtype(document["data_type"]).numpy_dtype
        chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
        shape, chunk = (
            [operator.index(length) for length in lengths]
            for lengths in (document["shape"], chunks)
        )
        if min([*shape, *chunk, 0]) < 0:
            raise ValueError("negative sizes would make up for others")
        return max(math.prod(shape), math.prod(chunk)) * kind.itemsize
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(
            folder, f"{name!r} in state describes no array"
        ) from error
