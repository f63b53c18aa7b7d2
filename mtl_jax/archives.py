"""NumPy's ``.npz`` files from anywhere: what they claim is checked before it is read.

An archive may be damaged or made to harm: names lead nowhere, as nothing is extracted;
Python objects, which run code when they are read, are refused; and arrays take no more
memory than such a file can hold in earnest, however small it is packed.
"""

import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np

MAX_ARRAYS = 20_000
SMALL_BYTES = 64 * 2**20
"""Arrays of so many bytes together may be packed however well."""

MAX_RATIO = 20
"""Those of larger files take so many times the bytes of the file at most."""

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
"""How arrays may be packed: LZMA is that of the data that ships with the package."""

PIECE = 4096
"""Bytes read at a time: ``zipfile`` unpacks all of LZMA that it reads, and a byte may
stand for 7,000."""


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Args:
      path: The ``.npz`` file.
      names: Which arrays to read, all of them by default.

    Returns:
      Name -> array.

    Raises:
      ValueError: If the file is damaged, lacks an array, holds Python objects or takes
        far more memory than its size; the message begins with its path.
      OSError: If there is no such file.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = _entries(archive)
                wanted = list(entries if names is None else names)
                missing = [name for name in wanted if name not in entries]
                if missing:
                    raise ValueError(f"it has no array {missing[0]!r}")
                _check_size(archive, [entries[name] for name in wanted])
                return {name: _read(archive, entries[name]) for name in wanted}
        except Exception as error:
            # A damaged file raises a different error for each place of the damage.
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            raise ValueError(f"{path} is damaged or no .npz file ({reason})") from error


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Array name -> its entry, of which there must be one."""
    entries = {}
    found = archive.infolist()
    if len(found) > MAX_ARRAYS:
        raise ValueError(f"it has {len(found):,} arrays, more than {MAX_ARRAYS:,}")
    for entry in found:
        name = entry.filename.removesuffix(".npy")
        if name == entry.filename or name in entries:
            raise ValueError(f"its entry {entry.filename!r} is no array, or not alone")
        entries[name] = entry
    return entries


def _check_size(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    packed = sum(entry.compress_size for entry in entries)
    total = sum(_check_header(archive, entry) for entry in entries)
    if total > max(SMALL_BYTES, MAX_RATIO * packed):
        raise ValueError(
            f"its arrays would take {total:,} bytes, but are packed in {packed:,}"
        )


def _check_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Bytes of an array, by its header and by the size of its entry alike."""
    if entry.compress_type not in METHODS:
        raise ValueError(f"{entry.filename!r} is packed by an unknown method")
    with archive.open(entry) as packed:
        member = _InPieces(packed)
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            # Later ones are for headers beyond 64 KiB, all of which NumPy reads before
            # it refuses them.
            raise ValueError(f"{entry.filename!r} is of an unknown version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        header = packed.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{entry.filename!r} holds Python objects, which could run code"
        )
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != entry.file_size - header:
        raise ValueError(
            f"{entry.filename!r} says that it is {dtype} {shape}, but its size is "
            f"{entry.file_size - header:,} bytes"
        )
    return size


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as member:
        return np.lib.format.read_array(_InPieces(member), allow_pickle=False)


class _InPieces:
    """An entry of an archive, of which never much is unpacked at once."""

    def __init__(self, member: IO[bytes]):
        self._member = member

    def read(self, size: int = PIECE, /) -> bytes:
        """So many bytes or fewer; none at the end."""
        return self._member.read(min(size, PIECE))
