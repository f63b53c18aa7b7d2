"""No damage to a checkpoint goes unseen, and a run continues from the one before."""

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtl_jax.train import RunFolderError, integrity, saved_config
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.integrity import MANIFEST, DamagedCheckpointError
from mtl_jax.train.state import TrainState

DESCRIPTION = {"tasks": ["a", "b"], "config": {"fields": {"seed": 0}}}


def state(step):
    """A state with an array that is large enough for a file of its own."""
    return TrainState(
        jnp.int32(step),
        {"large": jnp.arange(2**19, dtype=jnp.float32) + step, "small": jnp.ones(3)},
        (),
        (jnp.zeros(3),),
        jax.random.key(step),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, DESCRIPTION)
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    for step in (2, 4):
        checkpoints.save(step, state(step), data)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(written, tmp_path / "checkpoints")


@pytest.fixture
def read():
    """Reads a folder: `Checkpoints` that are closed at the end."""
    opened = []

    def read(folder, description=DESCRIPTION, **options):
        opened.append(Checkpoints(folder, description, **options))
        return opened[-1]

    yield read
    for checkpoints in opened:
        checkpoints.close()


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip(place):
    def flipped(content):
        where = {"first": 0, "middle": len(content) // 2, "last": -1}[place]
        damaged = bytearray(content)
        damaged[where] ^= 1
        return bytes(damaged)

    return flipped


DAMAGES = {
    "truncated by a byte": lambda content: content[:-1],
    "truncated to half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "first byte flipped": flip("first"),
    "middle byte flipped": flip("middle"),
    "last byte flipped": flip("last"),
    "longer": lambda content: content + b"\0",
    "removed": None,
}


def test_every_damage_to_every_file_is_seen_and_named(folder, read, capfd):
    names = [path.relative_to(folder / "4") for path in files(folder / "4")]
    assert len(names) > 15
    assert {MANIFEST, "state", "data", "run"} <= {name.parts[0] for name in names}
    assert max((folder / "4" / name).stat().st_size for name in names) > integrity.SMALL
    for name in names:
        path = folder / "4" / name
        content = path.read_bytes()
        checkpoints = None
        for damage, change in DAMAGES.items():
            if change is None:
                path.unlink()
            else:
                assert change(content) != content
                path.write_bytes(change(content))
            # Opened when the file is damaged already.
            checkpoints = checkpoints or read(folder, read_only=True)
            with pytest.raises(DamagedCheckpointError) as error:
                checkpoints.restore_state(4, state(0))
            assert error.value.reason.startswith(f"{name} "), (name, damage)
            assert f"{folder}/4 is damaged" in str(error.value)
            path.write_bytes(content)
    # It was the damage that was refused.
    restored = read(folder, read_only=True).restore_state(4, state(0))
    np.testing.assert_array_equal(restored.params["large"], np.arange(2**19) + 4)
    assert "damage" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["state/array_metadatas/process_1", "run/more"])
def test_files_that_do_not_belong_there_are_seen(folder, read, name):
    (folder / "4" / name).write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=f"{name} was not there when"):
        read(folder, read_only=True).restore_state(4, state(0))


def test_what_a_desktop_leaves_behind_does_no_harm(folder, read):
    (folder / "4" / "state" / ".DS_Store").write_text("")
    assert read(folder, read_only=True).restore_state(4, state(0)).key.shape == ()


def test_the_manifest_is_what_other_tools_find(written):
    """Sizes and hashes of all files, by nothing of ours."""
    manifest = json.loads((written / "4" / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert manifest["files"] == {
        path.relative_to(written / "4").as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in files(written / "4")
        if path.name != MANIFEST
    }


def test_plain_orbax_reads_what_is_written(written):
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore((written / "2" / "state").absolute())
    np.testing.assert_array_equal(found["params"]["large"], np.arange(2**19) + 2)
    assert found["key"] == jax.random.key(2)


def damage(folder, step):
    """Flips a bit of the largest file, which holds the array."""
    path = max(files(folder / str(step)), key=lambda path: path.stat().st_size)
    path.write_bytes(flip("middle")(path.read_bytes()))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(folder, read, capfd):
    damage(folder, 4)
    checkpoints = read(folder)
    step, restored = checkpoints.restore_newest(lambda: state(0))
    assert step == restored.step == 2
    np.testing.assert_array_equal(restored.params["large"], np.arange(2**19) + 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"the checkpoint {folder}/4 is damaged (state/" in line
    assert line.endswith(
        "has another content); its new name is 4.damaged, and that of step 2 is used"
    )
    assert checkpoints.steps == [2]
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpoints.restore_data(2, data)
    # The run gets there again, and its checkpoint is damaged again.
    checkpoints.save(4, state(4), data)
    checkpoints.close()
    damage(folder, 4)
    assert read(folder).restore_newest(lambda: state(0))[0] == 2
    assert {path.name for path in folder.iterdir()} == {"2", "4.damaged", "4.damaged.2"}


def test_readers_pass_over_a_damaged_checkpoint_and_leave_it(folder, read, capfd):
    damage(folder, 4)
    before = files(folder)
    checkpoints = read(folder, read_only=True)
    assert checkpoints.restore_newest(lambda: state(0))[0] == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "passed over, and that of step 2 is used" in line
    assert files(folder) == before


def test_all_damaged_is_an_error_and_none_is_renamed(folder, read):
    damage(folder, 4)
    (folder / "2" / MANIFEST).unlink()
    with pytest.raises(RunFolderError) as error:
        read(folder).restore_newest(lambda: state(0))
    assert f"{folder}/4 is damaged (state/" in str(error.value)
    assert f"so is 2 ({MANIFEST} is missing)" in str(error.value)
    assert "from a copy, or begin anew in another folder" in str(error.value)
    assert {path.name for path in folder.iterdir()} == {"2", "4"}


def test_no_checkpoints_are_no_error(tmp_path, read):
    assert read(tmp_path / "new").restore_newest(lambda: state(0)) is None


def test_what_the_disk_cannot_read_is_damaged_and_what_is_locked_is_not(
    folder, read, monkeypatch
):
    for number, kind, expected in (
        (errno.EIO, DamagedCheckpointError, "cannot be read from the disk"),
        (errno.EACCES, RunFolderError, "cannot be read: Permission denied; make it"),
        (errno.EMFILE, RunFolderError, "cannot be read: Too many open files; try"),
    ):

        def fail(*_, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(hashlib, "file_digest", fail)
            with pytest.raises(RunFolderError, match=expected) as error:
                read(folder, read_only=True).restore_state(4, state(0))
        assert type(error.value) is kind


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.EMFILE, "said by the system"), "read: Too many open files; try"),
        (ValueError("[os_error_code='12'] ..."), "read: Cannot allocate memory; try"),
        (
            OSError("no number"),
            "read: no number; try again, and look after the storage",
        ),
        (ValueError("unknown codec"), r"restored \(unknown codec\), though its files"),
    ],
)
def test_storage_that_fails_is_not_blamed_on_packages(
    folder, read, monkeypatch, failure, expected
):
    def fail(*_, **__):
        raise failure

    checkpoints = read(folder, read_only=True)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(RunFolderError, match=f"checkpoints/4 cannot be {expected}"):
        checkpoints.restore_state(4, state(0))


def test_what_a_run_that_trains_has_deleted_is_no_damage(written, tmp_path, read):
    folder = tmp_path / "checkpoints"
    shutil.copytree(written / "2", folder / "2")
    checkpoints = read(folder, read_only=True)
    assert checkpoints.steps == [2]

    def like():
        # Once the steps are listed, before the first is read.
        (folder / "2").rename(tmp_path / "deleted")
        shutil.copytree(written / "4", folder / "4")
        return state(0)

    step, restored = checkpoints.restore_newest(like)
    assert step == restored.step == 4


def test_the_config_of_the_newest_checkpoint_that_tells_it(folder):
    assert saved_config(folder.parent / "nowhere") is None
    config = DESCRIPTION["config"]
    assert saved_config(folder) == (folder / "4", config)
    (folder / "4" / "run" / "metadata").write_text('{"config": {}}')
    assert saved_config(folder) == (folder / "2", config)


@pytest.mark.parametrize("text", ["3", "{", "[" * 100_000, '{"config": 3}', "{}"])
def test_a_stranger_s_checkpoint_that_tells_no_config(folder, text):
    (folder / "4" / "run" / "metadata").write_text(text)
    entry = {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "size": len(text),
    }
    rewrite_manifest(
        folder / "4", lambda document: document["files"].update({"run/metadata": entry})
    )
    assert saved_config(folder) is None


def rewrite_manifest(checkpoint, change):
    """Changes a manifest and its own SHA-256 with it, as another release may."""
    path = checkpoint / MANIFEST
    document = json.loads(path.read_text())
    del document["sha256"]
    change(document)
    text = json.dumps(document, indent=1, sort_keys=True)
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def test_a_later_format_is_refused_and_not_set_aside(folder, read):
    rewrite_manifest(folder / "4", lambda document: document.update(format=2))
    with pytest.raises(RunFolderError, match="has format 2, and this release") as error:
        read(folder).restore_newest(lambda: state(0))
    assert "reads those up to 1; use the release that wrote it" in str(error.value)
    assert (folder / "4").is_dir()


def test_a_checkpoint_under_the_name_of_another_is_refused(folder, read):
    (folder / "4").rename(folder / "6")
    with pytest.raises(RunFolderError, match="6 is that of step 4; give the folder"):
        read(folder, read_only=True).restore_state(6, state(0))


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (
            ["b", "a"],
            "a, b in the checkpoint, and in the config in another order: b, a",
        ),
        (["a", "b", "c", "d"], "the config adds the tasks c, d"),
        (["c", "a"], "the config adds the tasks c; the config lacks the tasks b"),
    ],
)
def test_other_tasks_are_refused_where_all_shapes_are_the_same(
    folder, read, tasks, expected
):
    other = {"tasks": tasks, "config": {"fields": {"seed": 1, "more": "x"}}}
    with pytest.raises(RunFolderError, match=expected) as error:
        read(folder, other, read_only=True).restore_newest(lambda: state(0))
    assert "(more: '(unset)' -> 'x'; seed: 0 -> 1)" in str(error.value)


def test_what_a_killed_save_leaves_is_no_checkpoint(folder, read):
    """Before the manifest is written, and before the folder gets its name."""
    for name in ("6.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp.whole"):
        shutil.copytree(folder / "4", folder / name)
    checkpoints = read(folder)
    assert checkpoints.steps == [2, 4]
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpoints.save(6, state(6), data)
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"4", "6"}
    assert read(folder).restore_newest(lambda: state(0))[0] == 6


def free_port():
    """A port that nobody listens on, and that no outgoing connection is given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def test_all_processes_pass_over_what_one_of_them_finds_damaged(tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    worker = Path(__file__).with_name("checkpoint_of_several.py")
    both = [
        subprocess.Popen(
            [sys.executable, worker, coordinator, str(process), tmp_path / "several"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(worker.parents[2])},
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    for out, err in outputs:
        lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        first, second, third = lines
        assert first == "restored 2, and there are [2, 4]", err
        assert second == "restored 2, and there are [2]"
        assert "2 is damaged (state/_METADATA is missing)" in third
    warnings = [
        [line for line in err.splitlines() if "mtl-jax:" in line] for _, err in outputs
    ]
    assert not warnings[1]
    passed, aside = warnings[0]
    assert "4 is damaged (state/ocdbt.process_1/d/" in passed
    assert "passed over, and that of step 2" in passed
    assert "its new name is 4.damaged" in aside
    assert (tmp_path / "several" / "4.damaged").is_dir()
