"""A stranger's checkpoint whose metadata claim more than its files hold."""

import copy
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from mtl_jax.train import RunFolderError
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.integrity import write_manifest
from mtl_jax.train.start_from import start_from
from mtl_jax.train.state import TrainState

KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)
NAME = "params.trunk.kernel"


class NoData:
    """Stands for an iterator over batches."""

    def get_state(self):
        return {}


@pytest.fixture
def state():
    params = {"trunk": {"kernel": jnp.array(KERNEL)}, "heads": {}}
    return TrainState(jnp.int32(0), params, (), (), jax.random.key(0))


@pytest.fixture
def run(state, tmp_path):
    """The folder of a run with a checkpoint at step 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state, NoData())
    checkpoints.close()
    return tmp_path


@pytest.fixture(params=["start", "continue"])
def read(request, state):
    """Reads the kernel of a run's newest checkpoint."""

    def start(run):
        return start_from({}, run=str(run), make=lambda fresh, saved: saved)

    def go_on(run):
        checkpoints = Checkpoints(run / "checkpoints", read_only=True)
        try:
            return checkpoints.restore_newest(lambda: state)[1].params
        finally:
            checkpoints.close()

    chosen = {"start": start, "continue": go_on}[request.param]
    return lambda run: np.asarray(chosen(run)["trunk"]["kernel"])


def larger(document):
    """An array that the only chunk, of another size, does not fill."""
    document["shape"] = [2**14, 2**13]
    for grid in (document["chunk_grid"], document["codecs"][0]):
        grid["configuration"]["chunk_shape"] = document["shape"]


def packed(document):
    """The only chunk of a small array is a large one."""
    document["chunk_grid"]["configuration"]["chunk_shape"] = [2**14, 2**13]
    document["codecs"] = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "gzip", "configuration": {"level": 1}},
    ]


def endless(document):
    document["shape"] = [float("inf"), 3]


def negative(document):
    document["shape"] = [-(2**60), 1]


def text(document):
    document["shape"] = [2**40, "3"]


def no_array(document):
    del document["chunk_grid"]


def change(run, changed, chunk=None, name="zarr.json"):
    """Replaces metadata of the kernel, and perhaps its chunk; all files fit them."""
    checkpoint = run / "checkpoints" / "3"
    base = {"driver": "file", "path": f"{checkpoint}/state/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    document = json.loads(store.read(f"{NAME}/zarr.json").result().value)
    before = copy.deepcopy(document)
    changed(document)
    assert (document != before) == (name == "zarr.json")
    store.write(f"{NAME}/{name}", json.dumps(document)).result()
    if chunk is not None:
        store.write(f"{NAME}/c/0/0", chunk).result()
    write_manifest(checkpoint)


def test_it_is_read_as_it_was_written(run, read):
    np.testing.assert_array_equal(read(run), KERNEL)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (larger, r"its arrays would take 536,870,9\d\d bytes, and its files [0-9,]+"),
        (packed, r"its arrays would take 536,870,9\d\d bytes, and its files [0-9,]+"),
        (endless, f"'{NAME}/zarr.json' in state describes no array"),
        (negative, f"'{NAME}/zarr.json' in state describes no array"),
        (text, f"'{NAME}/zarr.json' in state describes no array"),
        (no_array, f"'{NAME}/zarr.json' in state describes no array"),
    ],
)
def test_what_its_files_do_not_hold_is_not_made_room_for(run, read, changed, expected):
    chunk = gzip.compress(bytes(2**20)) if changed is packed else None
    change(run, changed, chunk)
    with pytest.raises(RunFolderError, match=rf"/3 is damaged \({expected}\)"):
        read(run)


def test_arrays_in_another_format_are_not_looked_for(run, read):
    change(run, lambda document: None, name=".zarray")
    message = rf"is damaged \(state holds '{NAME}/.zarray', no array\)"
    with pytest.raises(RunFolderError, match=message):
        read(run)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "manifest.ocdbt is missing"), (b"no store", "state holds no arrays")],
)
def test_a_folder_that_is_no_store(run, read, content, expected):
    file = run / "checkpoints" / "3" / "state" / "manifest.ocdbt"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    write_manifest(file.parents[1])
    with pytest.raises(RunFolderError, match=rf"is damaged \(.*{expected}\)"):
        read(run)
