"""Whether a checkpoint holds what was written: sizes and SHA-256 of all its files."""

import asyncio
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from orbax.checkpoint import path as orbax_path

from mtl_jax.train.run_folder import (
    MOST_BYTES,
    RunFolderError,
    open_without_links,
    read_document,
)

FORMAT = 1
"""Number of the format of checkpoints; a higher one cannot be read."""

MANIFEST = "manifest.json"
"""Name of the file, inside a checkpoint, that lists the others."""

FIRST = "first_checkpoint.json"
"""Name of the file, in a run's folder, that its first complete checkpoint leaves.

Where it is and there are no checkpoints, they are lost.
"""

ARRAYS = "d"
"""Name of the folders, inside a checkpoint, whose files hold arrays.

The others are read whole.
"""

SMALL = 2**20
"""Bytes up to which a file is read at once; those with the arrays are larger."""

THREADS = min(8, os.cpu_count() or 1)


class DamagedCheckpointError(RunFolderError):
    """A checkpoint does not hold what was written.

    Args:
      folder: The checkpoint.
      reason: Which file, and what is wrong with it.
    """

    def __init__(self, folder: Path, reason: str):
        self.folder, self.reason = folder, reason
        super().__init__(
            f"the checkpoint {folder} is damaged ({reason}); restore it from a copy, "
            "or leave out --step to use the newest that is whole"
        )


class Entry(NamedTuple):
    """What is known of a file.

    Attributes:
      size: In bytes.
      sha256: Of its content, in hexadecimal digits.
    """

    size: int
    sha256: str


class CheckedTemporaryPath(orbax_path.atomicity.AtomicRenameTemporaryPath):
    """Where Orbax writes a checkpoint, with a manifest before it gets its name.

    The folder of a checkpoint has its final name only once it is complete, and the
    manifest is in it then. Of several processes, the first one finishes.
    """

    async def finalize(self) -> None:
        """Writes the manifest and renames the folder."""
        suffix = orbax_path.atomicity.TMP_DIR_SUFFIX
        if suffix in self._final_path.parent.name:
            # One item of a checkpoint, whose files are listed with all others.
            await super().finalize()
            return
        # Orbax writes its last files as it renames. This name also is one of those
        # that it deletes if the process is killed here.
        complete = self._final_path.with_name(f"{self._final_path.name}{suffix}.whole")
        await orbax_path.atomicity.AtomicRenameTemporaryPath(
            self.get(),
            complete,
            checkpoint_metadata_store=self._checkpoint_metadata_store,
        ).finalize()
        await asyncio.to_thread(write_manifest, Path(complete))
        await asyncio.to_thread(os.rename, complete, self._final_path)
        await asyncio.to_thread(_leave_a_mark, Path(self._final_path))


def _leave_a_mark(folder: Path) -> None:
    mark = folder.parent.parent / FIRST
    if not mark.exists():
        with open_without_links(mark, "w") as file:
            file.write(f'{{"step": {folder.name}}}\n')


def write_manifest(folder: Path) -> None:
    """Writes down size and SHA-256 of every file in a checkpoint."""
    names = listed_files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(lambda name: _sha256(folder / name), names)
        entries = [
            Entry((folder / name).stat().st_size, digest)
            for name, digest in zip(names, hashes, strict=True)
        ]
    files = {name: entry._asdict() for name, entry in zip(names, entries, strict=True)}
    document = {"format": FORMAT, "files": files}
    (folder / MANIFEST).write_bytes(_serialized(document))


def check_files(folder: Path) -> dict[str, Entry]:
    """Checks a checkpoint but for the content of its large files.

    Names that begin with a dot, which desktops and network file systems leave behind,
    are passed over: no file of a checkpoint has such a name.

    Args:
      folder: The checkpoint.

    Returns:
      The large files, whose content is for `check_contents`.

    Raises:
      DamagedCheckpointError: If a file is missing, additional, of another size or
        content, or the manifest is.
      RunFolderError: If the checkpoint is of a later format, or cannot be read.
    """
    entries = _read_manifest(folder)
    try:
        sizes = {name: (folder / name).stat().st_size for name in listed_files(folder)}
    except OSError as error:
        name = Path(error.filename or folder).name
        raise _unreadable(folder, name, error) from error
    missing = sorted(set(entries) - set(sizes))
    if missing:
        raise DamagedCheckpointError(folder, f"{missing[0]} is missing")
    added = sorted(set(sizes) - set(entries))
    if added:
        raise DamagedCheckpointError(
            folder, f"{added[0]} was not there when it was written"
        )
    for name, entry in entries.items():
        if sizes[name] != entry.size:
            raise DamagedCheckpointError(
                folder, f"{name} has {sizes[name]} bytes, not {entry.size}"
            )
        if entry.size > MOST_BYTES and Path(name).parent.name != ARRAYS:
            raise DamagedCheckpointError(
                folder, f"{name} has {entry.size:,} bytes, more than any run writes"
            )
    large = {name: entry for name, entry in entries.items() if entry.size > SMALL}
    check_contents(
        folder, {name: entry for name, entry in entries.items() if name not in large}
    )
    return large


def check_contents(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Checks the content of files.

    Args:
      folder: The checkpoint.
      entries: Those of its files to check.

    Raises:
      DamagedCheckpointError: If one has another content.
      RunFolderError: If one cannot be read.
    """
    # The largest first, so that no thread is left alone with one at the end.
    names = sorted(entries, key=lambda name: (-entries[name].size, name))
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(lambda name: _sha256_of(folder, name), names)
        for name, digest in zip(names, hashes, strict=True):
            if digest != entries[name].sha256:
                raise DamagedCheckpointError(folder, f"{name} has another content")


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    # One that is still being written has another name.
    names = [path.name for path in directory.glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def checked_text(folder: Path, name: str) -> str:
    """Content of a file of a checkpoint that is as it was written.

    Args:
      folder: The checkpoint.
      name: Of the file, relative to the folder.

    Raises:
      DamagedCheckpointError: If it is missing or has another content.
      RunFolderError: If the checkpoint is of a later format, or cannot be read.
    """
    entries = _read_manifest(folder)
    if name not in entries:
        raise DamagedCheckpointError(folder, f"{MANIFEST} does not list {name}")
    content = _read(folder, name)
    if hashlib.sha256(content).hexdigest() != entries[name].sha256:
        raise DamagedCheckpointError(folder, f"{name} has another content")
    return content.decode(errors="replace")


def _read(folder: Path, name: str) -> bytes:
    try:
        return read_document(folder / name)
    except OSError as error:
        raise _unreadable(folder, name, error) from error
    except ValueError as error:
        raise DamagedCheckpointError(folder, f"{name}: {error}") from error


def _read_manifest(folder: Path) -> dict[str, Entry]:
    written = _read(folder, MANIFEST)
    try:
        document = json.loads(written)
        del document["sha256"]
        if _serialized(document) != written:
            raise ValueError
        if document["format"] > FORMAT:
            raise RunFolderError(
                f"the checkpoint {folder} has format {document['format']}, and this "
                f"release of mtl_jax reads those up to {FORMAT}; use the release that "
                "wrote it, or a later one"
            )
        return {name: Entry(**entry) for name, entry in document["files"].items()}
    except RunFolderError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(
            folder, f"{MANIFEST} has another content"
        ) from error


def _serialized(document: Mapping) -> bytes:
    """The document with the SHA-256 of itself, so that any change of it shows."""
    text = json.dumps(document, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    whole = json.dumps({**document, "sha256": digest}, indent=1, sort_keys=True)
    return f"{whole}\n".encode()


def listed_files(folder: Path) -> list[str]:
    """Paths of all files but the manifest, relative to the folder and in order."""
    return sorted(_walk(folder, folder))


def _walk(folder: Path, root: Path, hidden: bool = False) -> Iterable[str]:
    for path in folder.iterdir():
        name = path.relative_to(root).as_posix()
        passed_over = hidden or path.name.startswith(".")
        link = path.is_symlink()
        if path.is_dir() and not link:
            yield from _walk(path, root, passed_over)
        elif not path.is_file() or (link and passed_over):
            # A stranger's index of arrays may lead to any file in the checkpoint, and a
            # pipe never ends.
            raise DamagedCheckpointError(
                root, f"{name} is neither a file nor a folder of its own"
            )
        elif not passed_over and name != MANIFEST:
            yield name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(folder: Path, name: str) -> str:
    try:
        return _sha256(folder / name)
    except OSError as error:
        raise _unreadable(folder, name, error) from error


def _unreadable(folder: Path, name: str, error: OSError) -> RunFolderError:
    """Damage where the disk says so; else the checkpoint may well be whole."""
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpointError(folder, f"{name} is missing")
    if error.errno == errno.EIO:
        return DamagedCheckpointError(folder, f"{name} cannot be read from the disk")
    remedy = "make it readable"
    if not isinstance(error, PermissionError):
        remedy = "try again, and look after the storage if it stays so"
    return RunFolderError(f"{folder / name} cannot be read: {error.strerror}; {remedy}")
