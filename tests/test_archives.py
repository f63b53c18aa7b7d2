import zipfile

import numpy as np
import pytest

from mtl_jax.archives import read_npz


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        (zipfile.ZIP_STORED, False),
        (zipfile.ZIP_DEFLATED, False),
        (zipfile.ZIP_BZIP2, True),
        (zipfile.ZIP_LZMA, True),
    ],
)
def test_arrays_are_packed_as_numpy_does(tmp_path, method, refused):
    """A few bytes of other methods may be gigabytes, unpacked before they are seen."""
    np.save(tmp_path / "a.npy", np.arange(3))
    with zipfile.ZipFile(tmp_path / "data.npz", "w", method) as file:
        file.write(tmp_path / "a.npy", "a.npy")
    if refused:
        with pytest.raises(ValueError, match=r"'a\.npy' is packed as no \.npz file is"):
            read_npz(tmp_path / "data.npz")
    else:
        found = read_npz(tmp_path / "data.npz")
        np.testing.assert_array_equal(found["a"], np.arange(3))
