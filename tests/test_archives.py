import io
import lzma
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from mtl_jax.archives import read_npz


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]
)
def test_arrays_are_read(tmp_path, method):
    arrays = {"a": np.arange(30_000).reshape(3, -1), "b": np.float32(2.5)}
    with zipfile.ZipFile(tmp_path / "data.npz", "w", method) as file:
        for name, array in arrays.items():
            file.writestr(f"{name}.npy", npy(array))
    found = read_npz(tmp_path / "data.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_what_is_packed_in_other_ways_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.npz", "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("a.npy", npy(np.arange(3)))
    with pytest.raises(ValueError, match=r"'a\.npy' is packed by an unknown method"):
        read_npz(tmp_path / "data.npz")


def test_of_what_lzma_packs_little_is_unpacked_at_once(tmp_path):
    """An array of 32 MB, and behind it 128 MB that the entry does not count."""
    expected, zeros = np.zeros(2**23, np.float32), 2**27
    array = npy(expected)
    settings = {"dict_size": 4096, "lc": 0, "lp": 0, "pb": 0}
    fast = {"mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "nice_len": 273, "depth": 1}
    chosen = {"id": lzma.FILTER_LZMA1, **settings}
    packed = lzma.compress(
        array + bytes(zeros), lzma.FORMAT_RAW, filters=[chosen | fast]
    )
    properties = struct.pack("<BI", 0, settings["dict_size"])
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as file:
        start = struct.pack("<BBH", 9, 4, len(properties)) + properties
        file.writestr("a.npy", start + packed)
        # What the list of entries says, which is written at the end.
        file.filelist[0].compress_type = zipfile.ZIP_LZMA
        file.filelist[0].file_size = len(array)
        file.filelist[0].CRC = zipfile.crc32(array)
    tracemalloc.start()
    try:
        found = read_npz(tmp_path / "data.npz")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found["a"], expected)
    assert most < zeros
