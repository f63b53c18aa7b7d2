"""The embedded arrays: damage is noticed, size and credits are kept."""

import shutil

import numpy as np
import pytest

from mtl_jax.data.arrays import FOLDER, load_arrays

DIGITS = {"image": (10_000, 28, 28), "digit": (10_000,)}


def empty(content: bytes) -> bytes:
    return b""


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def corrupted(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


@pytest.mark.parametrize("damage", [empty, truncated, corrupted])
def test_damaged_file_is_an_error_that_names_it_and_the_remedy(tmp_path, damage):
    content = (FOLDER / "digits.npz").read_bytes()
    (tmp_path / "digits.npz").write_bytes(damage(content))
    with pytest.raises(ValueError, match=r"digits\.npz is missing or damaged .*reinst"):
        load_arrays("digits.npz", DIGITS, tmp_path)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"digits\.npz is missing or damaged"):
        load_arrays("digits.npz", DIGITS, tmp_path)


def test_other_content_is_an_error(tmp_path):
    shutil.copy(FOLDER / "digits.npz", tmp_path / "earth.npz")
    with pytest.raises(ValueError, match="earth"):
        load_arrays("earth.npz", {"land": (1120, 2700)}, tmp_path)
    with pytest.raises(ValueError, match=r"'digit' .* shape \(10000,\) instead of"):
        load_arrays("digits.npz", {"digit": (5,)})


def test_pickled_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "digits.npz", digit=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="missing or damaged"):
        load_arrays("digits.npz", {"digit": (1,)}, tmp_path)


def test_files_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.npz")) <= 8e6


def test_every_array_has_its_credits():
    credits_ = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.npz"):
        assert path.name in credits_
        with np.load(path, allow_pickle=False) as file:
            for name in file:
                assert f"`{name}`" in credits_
