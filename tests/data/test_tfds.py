"""Any prepared TFDS data set as a source."""

import io
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mtl_jax.data.source import Field
from mtl_jax.data.sources.tfds import Tfds, open_split


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


def test_the_highest_version_is_read(data_dir, tmp_path):
    shipped = Path(data_dir) / "menagerie" / "1.2.3"
    for version in ("1.2.3", "1.10.0", "1.9.9"):
        copy = shutil.copytree(shipped, tmp_path / "menagerie" / version)
        info = json.loads((copy / "dataset_info.json").read_text())
        info |= {"version": version, "description": version}
        (copy / "dataset_info.json").write_text(json.dumps(info))
    for name, version in (("menagerie", "1.10.0"), ("menagerie:1.9.9", "1.9.9")):
        opened = open_split(name, "train", str(tmp_path))
        assert opened.examples.dataset_info.description == version


@pytest.fixture
def altered(data_dir, tmp_path):
    """Writes a copy of a data set, one file of which is altered; returns its folder."""
    counter = itertools.count()

    def write(file, change):
        folder = tmp_path / str(next(counter))
        copy = folder / "menagerie" / "1.2.3"
        shutil.copytree(Path(data_dir) / "menagerie" / "1.2.3", copy)
        if change is None:
            (copy / file).unlink()
        elif callable(change):
            document = json.loads((copy / file).read_text())
            change(document)
            (copy / file).write_text(json.dumps(document))
        else:
            (copy / file).write_text(change)
        return str(folder)

    return write


def refusal(folder):
    with pytest.raises(ValueError, match="'menagerie'") as error:
        Tfds("menagerie", "train", folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def replaced(*path, value):
    """A change of what is at a path of a JSON document."""

    def change(document):
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


FEATURES = ("featuresDict", "features")
MANY = (*FEATURES, "many")
HOSTILE = "hostile_feature.Feature"
IN_A_STRING = {
    "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
    "jsonFeature": {"json": json.dumps({"feature": {"type": HOSTILE, "content": {}}})},
}


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("features.json", None, "features.json"),
        ("features.json", "", "features.json is not valid JSON"),
        ("features.json", '{"featuresDict": ', "features.json is not valid JSON"),
        ("features.json", "3", "features.json is not a JSON object"),
        ("features.json", "[" * 100_000, "features.json is not valid JSON"),
        ("features.json", replaced(*FEATURES, value=3), "features"),
        ("features.json", replaced(*FEATURES, "weight", value=[]), "cannot be read"),
        (
            "features.json",
            replaced(*FEATURES, "weight", "tensor", "dtype", value="float33"),
            "features.json names the dtype 'float33'",
        ),
        (
            "features.json",
            replaced(*FEATURES, "number", "classLabel", "numClasses", value="9" * 15),
            "features.json has a feature of 999999999999999 classes",
        ),
        ("dataset_info.json", None, "it is not there"),
        ("dataset_info.json", "{", "dataset_info.json is not valid JSON"),
        ("dataset_info.json", "[]", "dataset_info.json is not a JSON object"),
        ("dataset_info.json", replaced("splits", value=3), "splits"),
        ("dataset_info.json", replaced("version", value="x"), "x"),
        ("dataset_info.json", replaced("fileFormat", value="exe"), "exe"),
        ("metadata.json", "{", "Expecting property name"),
        ("metadata.json", '{"class_names": 3}', "'int' object"),
    ],
)
def test_a_damaged_description_is_refused(altered, file, change, expected):
    assert expected in refusal(altered(file, change))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("features.json", replaced("pythonClassName", value=HOSTILE)),
        ("features.json", replaced(*MANY, "pythonClassName", value=HOSTILE)),
        ("features.json", replaced(*MANY, value={"python_class_name": HOSTILE})),
        ("features.json", '{"type": "hostile_feature.Feature", "content": {}}'),
        ("features.json", replaced(*MANY, value=IN_A_STRING)),
        ("dataset_info.json", replaced("features", value={"pythonClassName": HOSTILE})),
    ],
)
def test_a_hostile_description_runs_nothing(
    altered, tmp_path, monkeypatch, file, change
):
    (tmp_path / "hostile_feature.py").write_text("raise SystemExit('hostile')\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = altered(file, change)
    message = refusal(folder)
    assert f"{file} names 'hostile_feature.Feature'" in message
    assert "hostile_feature" not in sys.modules
    # TFDS itself runs it.
    with pytest.raises(SystemExit, match="hostile"):
        tfds.builder_from_directory(f"{folder}/menagerie/1.2.3")


def test_the_code_of_a_data_set_is_not_run(data_dir, tmp_path, monkeypatch):
    # TFDS has code for a data set of this name.
    copy = tmp_path / "mnist" / "1.2.3"
    shutil.copytree(Path(data_dir) / "menagerie" / "1.2.3", copy)
    for file in copy.glob("menagerie*"):
        file.rename(copy / file.name.replace("menagerie", "mnist"))
    (copy / "dataset_info.json").write_text(
        (copy / "dataset_info.json").read_text().replace("menagerie", "mnist")
    )
    monkeypatch.setattr(tfds, "builder_cls", lambda *_: pytest.fail("looked up"))
    monkeypatch.setattr(
        "tensorflow_datasets.core.load.builder", lambda *_, **__: pytest.fail("made")
    )
    assert int(Tfds("mnist", "train", str(tmp_path))[2]["three"][0]) == 2


def test_damaged_records_are_refused(altered):
    file = "menagerie-train.array_record-00000-of-00001"
    missing = Tfds("menagerie", "train", altered(file, None))
    with pytest.raises(OSError, match=r"record 3 of split 'train' .* prepare the data"):
        missing[3]
    with pytest.raises(IndexError):
        missing[6]


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
