"""Indices of arrays as TensorStore's OCDBT describes them, written byte by byte."""

import struct

NODE, MANIFEST = 0x0CDB20DE, 0x0CDB3A2A
FILE = b"d/a"
"""The only file that the indices lead to."""


def varint(number):
    """Seven bits a byte, the lowest first."""
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def varints(numbers):
    return b"".join(map(varint, numbers))


def crc32c(data):
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = _REMAINDERS[(checksum ^ byte) & 255] ^ (checksum >> 8)
    return checksum ^ 0xFFFFFFFF


def _remainder(byte):
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_REMAINDERS = [_remainder(byte) for byte in range(256)]


def wrapped(magic, content, *, packed=False):
    """A manifest or a node, with its header and its checksum."""
    content = varint(0) + varint(packed) + content
    length = 4 + 8 + len(content) + 4
    whole = struct.pack(">I", magic) + struct.pack("<Q", length) + content
    return whole + struct.pack("<I", crc32c(whole))


def zstandard(start, zeros):
    """A frame of Zstandard: some bytes, then many zeros in four bytes a 128 KiB."""
    blocks = [(0, len(start), start)]
    blocks += [(1, 2**17, b"\0")] * (zeros // 2**17)
    frame = bytes.fromhex("28b52ffd0058")
    for number, (kind, size, data) in enumerate(blocks, 1):
        last = number == len(blocks)
        frame += struct.pack("<I", last | kind << 1 | size << 3)[:3] + data
    return frame


CONFIG = bytes(16) + varints([0, 1024, 10**8]) + bytes([4, 0])
"""Of a manifest: name, kind, sizes, arity and no packing."""

ONE_FILE = varints([1, len(FILE), 0]) + FILE
"""A table of files."""


def manifest(height, offset, length):
    """Leads to the root of a tree of nodes, which is in the file."""
    root = varints([1, 1]) + bytes([height]) + varints([0, offset, length])
    # Sizes that nobody needs, the time, and no older versions.
    return wrapped(MANIFEST, CONFIG + ONE_FILE + root + varints([0] * 3) + bytes(9))


def leaf(entries):
    """A node with names and their values."""
    names, values = zip(*entries, strict=True)
    keys = [varints([0] * (len(names) - 1)), varints(map(len, names)), *names]
    lengths = varints(map(len, values))
    content = [*keys, lengths, bytes(len(values)), *values]
    return b"\0" + ONE_FILE + varint(len(names)) + b"".join(content)


def branch(height, names, offset, length):
    """A node all whose names lead to one and the same node below."""
    number = len(names)
    keys = [varints([0] * (number - 1)), *2 * [varints(map(len, names))], *names]
    below = varints([*[0] * number, *[offset] * number, *[length] * number])
    content = b"".join(keys) + below + varints([0] * 3 * number)
    return bytes([height]) + ONE_FILE + varint(number) + content
