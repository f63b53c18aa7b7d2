"""Damaged files: what a disk, a careless copy or an attacker makes of good ones."""

import copy
import io
import json
import random
import struct
import zipfile

import numpy as np

VALUES = (
    *(None, True, False, 0, -1, 1, 3, 1.5, -2.5, 1e308, -1e308, 10**12, 10**400, 2**63),
    *("", "a", "../../x", "<script>", "\0", "9" * 50, float("nan"), float("inf")),
    *([], {}, [1], [[]], {"a": 1}, [None], ["a", 1]),
)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file that was cut off, or has other bytes somewhere."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(end - at) + data[end:]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at:]
    if kind == 4:
        return rng.randbytes(rng.randrange(1, 300))
    if kind == 5:
        return b""
    # Near the ends, where formats say what is where.
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 9)):
        place = rng.randrange(min(200, len(data)))
        changed[place if rng.random() < 0.5 else -1 - place] = rng.randrange(256)
    return bytes(changed)


def damaged_json(document, rng: random.Random) -> str:
    """A JSON document with other values in one to three places, or without them."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randrange(1, 4)):
        node, key = document, None
        while (
            isinstance(node, dict | list)
            and node
            and (key is None or rng.random() < 0.8)
        ):
            parent = node
            key = (
                rng.choice(list(node))
                if isinstance(node, dict)
                else rng.randrange(len(node))
            )
            node = parent[key]
        if key is None:
            return json.dumps(rng.choice(VALUES))
        if rng.random() < 0.25:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(document)


def header(descr: str, shape, version=(1, 0)) -> bytes:
    """The beginning of an ``.npy`` file, whatever it claims."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text


def archive(entries: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file of such entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    """An array as an ``.npy`` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def npz_bombs(names) -> dict[str, bytes]:
    """Archives that would take much memory, run code, or leave their folder."""
    first, *_ = names
    good = {f"{name}.npy": npy(np.zeros(3, np.float32)) for name in names}

    def with_first(content: bytes) -> bytes:
        return archive(good | {f"{first}.npy": content})

    return {
        "of zeros without end": with_first(npy(np.zeros(2**28, np.uint8))),
        "of many zeros": archive(
            {f"{name}.npy": npy(np.zeros(2**25, np.uint8)) for name in (*names, *"abc")}
        ),
        "with a header that claims all memory": with_first(
            header("'<f8'", (2**40,)) + b"\0" * 64
        ),
        "with a header beyond 64 bits": with_first(header("'<f8'", (2**62, 2**62))),
        "with a negative shape": with_first(header("'<f8'", (-1, -8)) + bytes(64)),
        "with a shape of other things": with_first(header("'<f8'", "('a',)")),
        "with code for a type": with_first(header("__import__('os').abort()", (1,))),
        "with a nameless type": with_first(header("'<q99'", (1,)) + bytes(99)),
        "with a huge type": with_first(header(f"'V{2**31 - 1}'", (2**31,))),
        "with a long header": with_first(header("'<f8'", "(1, " + " " * 60_000 + ")")),
        "with a header of 256 MB": _with_long_header(
            {name: content for name, content in good.items() if name != f"{first}.npy"},
            f"{first}.npy",
        ),
        "of another version": with_first(b"\x93NUMPY\x09\x00\x00\x00"),
        "with Python objects": with_first(
            npy(np.array([Bomb()], object), allow_pickle=True)
        ),
        "that is a pickle": __import__("pickle").dumps({first: Bomb()}),
        "with a path out of it": archive({**good, "../../escaped.npy": b"x"}),
        "with an absolute path": archive({**good, "/tmp/escaped.npy": b"x"}),
        "without arrays": archive({"readme.txt": b"hello"}),
        "that is empty": archive({}),
        "with an array twice": _twice(good, f"{first}.npy"),
        "within an archive": archive({f"{first}.npy": archive(good)}),
    }


def _with_long_header(entries, name):
    """An archive with an entry that is one long header, of spaces."""
    size, piece = 2**28, 2**20
    buffer = io.BytesIO(archive(entries))
    with (
        zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open(name, "w") as entry,
    ):
        entry.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", size))
        for _ in range(size // piece):
            entry.write(b" " * piece)
    return buffer.getvalue()


def _twice(entries, name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for key, content in [*entries.items(), (name, entries[name])]:
            # As zipfile warns about it.
            info = zipfile.ZipInfo(key)
            file.NameToInfo.pop(key, None)
            file.writestr(info, content)
    return buffer.getvalue()


def safetensors(header_text, data: bytes = b"", size: int | None = None) -> bytes:
    """A file in that format, whatever it claims."""
    text = (
        header_text
        if isinstance(header_text, bytes)
        else json.dumps(header_text).encode()
    )
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def safetensors_bombs() -> dict[str, bytes]:
    """Files in that format with headers that claim what cannot be."""

    def one(**fields):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}
        return safetensors({"a": entry}, bytes(8))

    return {
        "whose header is larger than all files": safetensors({}, size=2**63),
        "whose header is larger than it": safetensors({}, size=10**9),
        "whose header is no JSON": safetensors(b"{{{"),
        "whose header is nested without end": safetensors(b"[" * 100_000),
        "whose header is a list": safetensors([]),
        "with a huge shape": one(shape=[2**62, 2**62]),
        "with a shape of another size": one(shape=[3]),
        "with a negative shape": one(shape=[-1, -2]),
        "with offsets outside": one(data_offsets=[0, 2**40]),
        "with offsets that run back": one(data_offsets=[8, 0]),
        "with an unknown type": one(dtype="F7"),
        "with a type that NumPy has not": safetensors(
            {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)
        ),
        "with arrays that overlap": safetensors(
            {
                name: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
                for name in "ab"
            },
            bytes(8),
        ),
        "with bytes left over": safetensors(
            {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, bytes(8)
        ),
        "that is a pickle": __import__("pickle").dumps(Bomb()),
    }


def damaged_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """An array of another type or shape, or with absurd values."""
    kind = rng.randrange(9)
    if kind == 0:
        return array.astype(
            rng.choice(
                [
                    "float32",
                    "int64",
                    "uint8",
                    "bool",
                    "<U5",
                    "S3",
                    "complex64",
                    "uint64",
                ]
            )
        )
    if kind == 1:
        return array[: rng.randrange(len(array) + 1)] if array.ndim else array[None]
    if kind == 2:
        return array.reshape(-1)
    if kind == 3:
        return array[None]
    if kind == 4:
        return np.zeros(0, array.dtype)
    if kind == 5:
        return np.full_like(array, rng.choice([0, 1, 3, 127]))
    if kind == 6:
        limits = (
            np.iinfo(array.dtype) if array.dtype.kind in "iu" else np.finfo(array.dtype)
        )
        return np.full_like(array, rng.choice([limits.min, limits.max]))
    if kind == 7:
        return np.full(array.shape, rng.choice([np.nan, np.inf, -np.inf]))
    return np.swapaxes(array, 0, -1)
