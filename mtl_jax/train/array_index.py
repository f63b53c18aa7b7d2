"""What the arrays of a checkpoint take in memory, by the index of them all.

    python array_index.py STATE BYTES SECONDS

prints how many bytes, for the folder STATE of a checkpoint. A stranger's index may be
packed to any size, repeat the names in it, or lead to parts of itself over and over;
TensorStore then takes all memory that there is, and aborts the process. So it is one of
its own, and ends when it has taken so much memory or time. It imports nothing else of
the package, which takes longer than all that it does.
"""

import json
import math
import operator
import os
import re
import resource
import sys
from collections import Counter
from pathlib import Path

import tensorstore

REFUSED = 3
"""Exit status where the reason is printed for which the arrays are not to be read."""

METADATA = "/zarr.json"
"""How the key of an array's metadata ends, behind the name of the array."""

PART = re.compile("/c(/[0-9]+)*$")
"""The same of a chunk."""

FEW_THREADS = {
    "data_copy_concurrency": {"limit": 1},
    "file_io_concurrency": {"limit": 4},
}
"""As the stack of each counts as memory."""


def claimed_bytes(state: Path) -> int:
    """Bytes that arrays take, each at least those of a chunk.

    Args:
      state: Absolute path of the folder that holds them, which has an index.

    Raises:
      ValueError: If one of them is kept in another way than here.
    """
    try:
        store = tensorstore.KvStore.open(
            {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}},
            context=tensorstore.Context(FEW_THREADS),
        ).result()
        names = [key.decode() for key in store.list().result()]
        found = [name for name in names if name.endswith(METADATA)]
        reads = [store.read(name) for name in found]
        texts = [read.result().value for read in reads]
    except ValueError as error:
        raise ValueError("state holds no arrays") from error
    arrays = {name.removesuffix(METADATA) for name in found}
    parts = Counter()
    for name in names:
        array = PART.sub("", name)
        if array not in arrays and not name.endswith(METADATA):
            raise ValueError(f"state holds {name!r}, no array")
        parts[array] += 1
    return sum(
        _bytes(name, text, parts[name.removesuffix(METADATA)])
        for name, text in zip(found, texts, strict=True)
    )


def _bytes(name: str, text: bytes, parts: int) -> int:
    try:
        document = json.loads(text)
        kind = tensorstore.dtype(document["data_type"]).numpy_dtype
        chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
        shape, chunk = (
            [operator.index(length) for length in lengths]
            for lengths in (document["shape"], chunks)
        )
        if min([*shape, 0]) < 0 or min([*chunk, 1]) < 1:
            raise ValueError("negative sizes would make up for others")
        (codec,) = document["codecs"]
        packing = [inner["name"] for inner in codec["configuration"]["codecs"]]
        if (codec["name"], packing) != ("sharding_indexed", ["bytes"]):
            raise ValueError("chunks might be packed")
        if codec["configuration"]["chunk_shape"] != chunks:
            raise ValueError("each part of a chunk takes memory, however small")
        number = math.prod(
            -(-length // step) for length, step in zip(shape, chunk, strict=True)
        )
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} in state describes no array") from error
    if number > parts:
        raise ValueError(f"{name!r} in state claims {number:,} chunks of {parts:,}")
    return max(math.prod(shape), math.prod(chunk)) * kind.itemsize


def main(state: str, most_bytes: str, most_seconds: str) -> None:
    """Prints what `claimed_bytes` returns or why it does not.

    Args:
      state: Absolute path of the folder.
      most_bytes: Memory that may be taken.
      most_seconds: Time of the processor that may be taken.
    """
    limits = {
        resource.RLIMIT_DATA: int(most_bytes),
        resource.RLIMIT_CPU: int(most_seconds),
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, hard))
    try:
        print(claimed_bytes(Path(state)))
    except MemoryError:
        os.abort()
    except ValueError as error:
        print(error)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main(*sys.argv[1:])
