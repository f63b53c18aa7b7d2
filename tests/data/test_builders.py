"""The embedded sources as TFDS: what is read back is what the sources hold."""

import pathlib

import numpy as np
import pytest

from mtl_jax.data.builders import prepare
from mtl_jax.data.sources.digits import Digits
from mtl_jax.data.sources.earth import Earth
from mtl_jax.data.sources.multi_digits import MultiDigits
from mtl_jax.data.sources.tfds import Tfds

SOURCES = {"digits": Digits, "earth": Earth, "multi_digits": MultiDigits}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    for name in SOURCES:
        prepare(name, folder)
    return folder


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_round_trip(data_dir, name, split):
    written, read = SOURCES[name](split), Tfds(name, split, data_dir)
    assert read.fields == written.fields
    assert len(read) == len(written)
    for index in [*range(0, len(written), 37), len(written) - 1]:
        expected, record = written[index], read[index]
        assert record.keys() == expected.keys()
        for field, value in expected.items():
            assert record[field].dtype == value.dtype
            np.testing.assert_array_equal(record[field], value)


def test_files_are_array_records_and_are_written_once(data_dir):
    folder = pathlib.Path(prepare("digits", data_dir))
    assert folder == pathlib.Path(data_dir) / "digits" / "1.0.0"
    files = list(folder.glob("*.array_record*"))
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    prepare("digits", data_dir)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"'zoo' is unknown; .*'digits', 'earth'"):
        prepare("zoo", str(tmp_path))
