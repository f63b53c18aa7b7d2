"""A stranger's checkpoint whose metadata claim more than its files hold."""

import copy
import gzip
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

sys.path.insert(0, str(Path(__file__).parent))
import index_by_hand as by_hand

from mtl_jax.train import RunFolderError, array_index, array_sizes
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.integrity import DamagedCheckpointError, write_manifest
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


def wider(document):
    """The only chunk of a small array is a large one."""
    for grid in (document["chunk_grid"], document["codecs"][0]):
        grid["configuration"]["chunk_shape"] = [2**14, 2**13]


def more(document):
    """An array of chunks, most of which are left out."""
    document["shape"] = [2000, 3000]


def divided(document):
    """A chunk of many parts, with a place and a size for each."""
    document["shape"] = [1, 2**22]
    document["chunk_grid"]["configuration"]["chunk_shape"] = [1, 2**22]
    document["codecs"][0]["configuration"]["chunk_shape"] = [1, 1]


def packed(document):
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


def opened(checkpoint):
    base = {"driver": "file", "path": f"{checkpoint}/state/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def change(run, changed, chunk=None, name="zarr.json"):
    """Replaces metadata of the kernel, and perhaps its chunk; all files fit them."""
    checkpoint = run / "checkpoints" / "3"
    store = opened(checkpoint)
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
        (wider, r"its arrays would take 536,870,9\d\d bytes, and its files [0-9,]+"),
        (more, f"'{NAME}/zarr.json' in state claims 1,000,000 chunks of 1"),
        (divided, f"'{NAME}/zarr.json' in state describes no array"),
        (packed, f"'{NAME}/zarr.json' in state describes no array"),
        (endless, f"'{NAME}/zarr.json' in state describes no array"),
        (negative, f"'{NAME}/zarr.json' in state describes no array"),
        (text, f"'{NAME}/zarr.json' in state describes no array"),
        (no_array, f"'{NAME}/zarr.json' in state describes no array"),
    ],
)
def test_what_its_files_do_not_hold_is_not_made_room_for(run, read, changed, expected):
    change(run, changed, gzip.compress(KERNEL.tobytes()) if changed is packed else None)
    with pytest.raises(RunFolderError, match=rf"/3 is damaged \({expected}\)"):
        read(run)


def test_files_that_are_passed_over_hold_nothing(run, read):
    with (run / "checkpoints" / "3" / ".hidden").open("wb") as file:
        file.truncate(2**40)
    change(run, larger)
    with pytest.raises(RunFolderError, match="its arrays would take 536,870,9"):
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


def put(run, content, manifest):
    """Replaces the index of all arrays; all files fit it."""
    state = run / "checkpoints" / "3" / "state"
    (state / "d" / "a").write_bytes(content)
    (state / "manifest.ocdbt").write_bytes(manifest)
    write_manifest(state.parent)


def as_it_was(run):
    store = opened(run / "checkpoints" / "3")
    names = store.list().result()
    entries = [(name, bytes(store.read(name).result().value)) for name in names]
    return 0, [by_hand.wrapped(by_hand.NODE, by_hand.leaf(entries))]


def packed_values(run):
    """Values of a MiB, all zeros."""
    number = 4096
    start = [b"\0", by_hand.ONE_FILE, by_hand.varint(number)]
    start += [by_hand.varints([0] * (number - 1) + [4] * number)]
    start += [b"%04d" % name for name in range(number)]
    start += [by_hand.varints([2**20] * number), bytes(number)]
    frame = by_hand.zstandard(b"".join(start), number * 2**20)
    return 0, [by_hand.wrapped(by_hand.NODE, frame, packed=True)]


def repeated_names(run):
    """Names of 64 KiB, of which three bytes are said anew each time."""
    number, most = 2**14, 2**16 - 1
    lengths = by_hand.varints([most - 3] * (number - 1) + [most] + [3] * (number - 1))
    names = b"k" * (most - 3) + b"".join(n.to_bytes(3, "big") for n in range(number))
    values = by_hand.varints([0] * number) + bytes(number)
    content = [b"\0", by_hand.ONE_FILE, by_hand.varint(number), lengths, names, values]
    return 0, [by_hand.wrapped(by_hand.NODE, b"".join(content))]


def many_files(run):
    """A table of as many files as there are zeros, of no name."""
    number = 2**31
    frame = by_hand.zstandard(b"\0" + by_hand.varint(number), 3 * number)
    return 0, [by_hand.wrapped(by_hand.NODE, frame, packed=True)]


def doubled(run):
    """Nodes of two names that lead to the same node below, forty times."""
    nodes = [by_hand.wrapped(by_hand.NODE, by_hand.leaf([(b"", b"")]))]
    for height in range(1, 41):
        offset = sum(map(len, nodes[:-1]))
        node = by_hand.branch(height, [b"0", b"1"], offset, len(nodes[-1]))
        nodes.append(by_hand.wrapped(by_hand.NODE, node))
    return 40, nodes


def write(run, make):
    height, nodes = make(run)
    offset = sum(map(len, nodes[:-1]))
    put(run, b"".join(nodes), by_hand.manifest(height, offset, len(nodes[-1])))


def test_an_index_by_hand_is_one(run, read):
    write(run, as_it_was)
    np.testing.assert_array_equal(read(run), KERNEL)


@pytest.mark.parametrize("make", [packed_values, repeated_names, many_files, doubled])
def test_an_index_without_end(run, state, monkeypatch, make):
    """It is read by a process that ends where it takes too much memory."""
    write(run, make)
    assert sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) < 2**18
    monkeypatch.setattr(array_sizes, "INDEX_BYTES", 2**28)
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    with pytest.raises(RunFolderError) as error:
        checkpoints.restore_newest(lambda: state)
    checkpoints.close()
    assert "3 takes more than 268,435,456 bytes or 200 seconds" in str(error.value)
    assert not isinstance(error.value, DamagedCheckpointError)


def test_a_reader_of_the_index_that_is_killed_is_no_damage(run, read, monkeypatch):
    program = run / "killed.py"
    program.write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(array_index, "__file__", str(program))
    with pytest.raises(
        RunFolderError, match=r"be listed \(status -9\); try again"
    ) as e:
        read(run)
    assert not isinstance(e.value, DamagedCheckpointError)
