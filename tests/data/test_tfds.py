"""Any prepared TFDS data set as a source."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mtl_jax.data.source import Field
from mtl_jax.data.sources.tfds import Tfds


class Menagerie(tfds.core.GeneratorBasedBuilder):
    """One feature of every kind."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        features = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            description="One feature of every kind.",
            features=features.FeaturesDict(
                {
                    "photo": features.Image(shape=(4, 5, 3)),
                    "any_size": features.Image(),
                    "animal": features.ClassLabel(names=["cat", "dog"]),
                    "number": features.ClassLabel(num_classes=3),
                    "weight": features.Scalar(np.float64),
                    "tame": features.Scalar(np.bool_),
                    "home": {
                        "map": features.Tensor(shape=(2, 2), dtype=np.int32),
                        "name": features.Text(),
                    },
                    "three": features.Sequence(features.Scalar(np.int64), length=3),
                    "many": features.Sequence(features.Scalar(np.int64)),
                    "boxes": features.Sequence({"box": features.BBoxFeature()}),
                    "track": features.Tensor(shape=(None, 2), dtype=np.float32),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 6)}

    def _generate_examples(self, begin, end):
        for index in range(begin, end):
            yield (
                index,
                {
                    "photo": png(photo(index)),
                    "any_size": png(photo(index)),
                    "animal": index % 2,
                    "number": -1,
                    "weight": index / 7,
                    "tame": index > 2,
                    "home": {"map": np.full((2, 2), -index, np.int32), "name": "den"},
                    "three": [index, 2, 3],
                    "many": list(range(index)),
                    "boxes": [],
                    "track": np.zeros((index, 2), np.float32),
                },
            )


class Prose(tfds.core.GeneratorBasedBuilder):
    """Text alone."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text alone.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield "only", {"text": "once"}


def photo(index):
    return np.arange(60, dtype=np.uint8).reshape(4, 5, 3) + np.uint8(index)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (Menagerie, Prose):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_fields_follow_from_the_features(data_dir):
    assert Tfds("menagerie", "train", data_dir).fields == {
        "photo": Field((4, 5, 3), "uint8"),
        "animal": Field((), "int32", 2, ("cat", "dog")),
        "number": Field((), "int32", 3, ("0", "1", "2")),
        "weight": Field((), "float64"),
        "tame": Field((), "bool"),
        "home/map": Field((2, 2), "int32"),
        "three": Field((3,), "int64"),
    }


def test_records_hold_what_was_written(data_dir):
    source = Tfds("menagerie", "train", data_dir)
    assert len(source) == 6
    for index in range(6):
        record = source[index]
        assert record.keys() == source.fields.keys()
        for name, field in source.fields.items():
            assert isinstance(record[name], np.ndarray)
            assert record[name].shape == field.shape
            assert record[name].dtype == field.dtype
        np.testing.assert_array_equal(record["photo"], photo(index))
        assert record["animal"] == index % 2
        assert record["number"] == -1
        # The files hold all floating-point numbers in single precision.
        assert record["weight"] == np.float32(index / 7)
        assert record["tame"] == (index > 2)
        assert (record["home/map"] == -index).all()
        np.testing.assert_array_equal(record["three"], [index, 2, 3])


def test_a_split_may_be_a_slice(data_dir):
    source = Tfds("menagerie:1.2.3", "train[50%:]", data_dir)
    assert [int(source[index]["three"][0]) for index in range(len(source))] == [3, 4, 5]


def test_a_source_can_be_sent_to_another_process(data_dir):
    source = Tfds("menagerie", "train", data_dir)
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    np.testing.assert_array_equal(copy[3]["photo"], photo(3))


def test_unknown_name_lists_what_is_prepared(data_dir):
    with pytest.raises(
        ValueError, match=r"'zoo' cannot be read .*\(menagerie:1\.2\.3, prose:1\.0\.0\)"
    ):
        Tfds("zoo", "train", data_dir)


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"prepared there \(nothing\)"):
        Tfds("zoo", "train", str(tmp_path))


def test_unknown_split_names_the_known_ones(data_dir):
    with pytest.raises(ValueError, match=r"Unknown split 'dev'.*\['train'\]"):
        Tfds("menagerie", "dev", data_dir)


def test_data_set_without_numbers_is_an_error(data_dir):
    with pytest.raises(ValueError, match=r"'prose' has no feature of numbers.*'text'"):
        Tfds("prose", "train", data_dir)


def test_missing_dependency_names_the_command():
    # A new process, in which the optional package can't be imported.
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from mtl_jax.data.builders import prepare\n"
        "from mtl_jax.data.sources.tfds import Tfds\n"
        "for use in (lambda: Tfds('mnist', 'train'), lambda: prepare('earth')):\n"
        "    try: use()\n"
        "    except ImportError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert run.stdout.count("pip install 'mtl_jax[tfds]'") == 2
