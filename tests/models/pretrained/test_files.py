import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FOLDER
from safetensors.numpy import load_file, save_file

from mtl_jax.models.pretrained import convert_vit, load_huggingface, read_arrays


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack"])
def test_what_could_run_code_is_refused_unopened(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(ValueError, match=r"may run code .*torch\.save_file"):
        read_arrays(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"model{suffix} may run code"):
        read_arrays(tmp_path)


def test_python_objects_in_npz_are_refused(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, bomb=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match="holds Python objects, which could run code"):
        read_arrays(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.npz", b"PK\x03\x04 and so on"),
        ("model.npz", b"\x93NUMPY\x01\x00 and so on"),
        ("model.npz", b""),
        ("model.safetensors", b"PK\x03\x04 and so on"),
    ],
)
def test_damaged_files_are_explained(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_arrays(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "does not exist; give a .safetensors or .npz"),
        ("model.safetensors", "does not exist"),
        ("", "holds no model.safetensors; save the model"),
    ],
)
def test_missing_files_are_explained(name, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        read_arrays(tmp_path / name)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="of an unknown kind"):
        read_arrays(tmp_path / "model.h5")


def test_parts_are_put_together_and_lie_beside_their_index(tmp_path):
    shutil.copytree(FOLDER / "vit", tmp_path / "vit")
    whole = load_file(FOLDER / "vit/model.safetensors")
    (tmp_path / "vit/model.safetensors").unlink()
    places = {}
    for index, names in enumerate((sorted(whole)[::2], sorted(whole)[1::2])):
        part = f"model-0000{index + 1}-of-00002.safetensors"
        save_file({name: whole[name] for name in names}, tmp_path / "vit" / part)
        # What an index of somebody else's says of other folders counts for nothing.
        places |= dict.fromkeys(names, f"../../{part}")
    index = {"metadata": {}, "weight_map": places}
    path = tmp_path / "vit/model.safetensors.index.json"
    path.write_text(json.dumps(index))
    arrays = read_arrays(tmp_path / "vit")
    assert set(arrays) == set(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert load_huggingface(tmp_path / "vit", convert_vit).trunk.width == 8
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        read_arrays(tmp_path / "vit")


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_types_are_read(dtype, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    save_file({"a": array}, tmp_path / "model.safetensors")
    read = read_arrays(tmp_path)["a"]
    np.testing.assert_array_equal(read.astype(np.float32), array.astype(np.float32))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "holds no JSON"), ("[]", "holds no JSON object")]
)
def test_a_damaged_config_is_explained(content, message, tmp_path):
    shutil.copytree(FOLDER / "vit", tmp_path / "vit")
    (tmp_path / "vit/config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_huggingface(tmp_path / "vit", convert_vit)


def test_the_package_that_reads_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match=r"pip install 'mtl_jax\[pretrained\]'"):
        read_arrays(FOLDER / "vit")
