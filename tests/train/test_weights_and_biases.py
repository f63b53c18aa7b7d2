"""What is logged offline, read from the files that would be sent."""

import json
import struct

import pytest

from mtl_jax.train.run_folder import RunFolder, RunFolderError

pytestmark = [
    pytest.mark.optional,
    # Its own dependencies warn.
    pytest.mark.filterwarnings("default"),
]
wandb = pytest.importorskip("wandb", reason="no extra of the tests installs it")
from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402

from mtl_jax.train.weights_and_biases import WeightsAndBiases  # noqa: E402

LINE = {
    "all/cosine": [[1.0, -0.5], [-0.5, None]],
    "all/loss": 1.5,
    "digit/expert_load/block_1": [0.5, 0.25, 0.25, 0.0],
    "digit/loss": None,
}
BLOCK, FIRST_HEADER = 32768, 7


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def log(folder, steps, loss=1.5, project="digits"):
    config = {"seed": 3}
    names = ("digit", "left")
    with WeightsAndBiases(folder, project, "name", config, names) as follower:
        for step in steps:
            line, timing = LINE | {"all/loss": loss}, {"step": step, "input_stall": 0.5}
            follower.update(step, line, timing, evaluated=step % 2 == 0)
    # Waits until all is in the file.
    wandb.teardown()


def records(path):
    """Of a log as LevelDB keeps it: pieces with a checksum, a length and a kind."""
    data, place, parts = path.read_bytes(), FIRST_HEADER, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def logged(folder):
    """Identities of the parts, and (step, values) of each line."""
    identities, lines = [], []
    for path in sorted((folder.path / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                identities.append((record.run.project, record.run.run_id))
            if record.HasField("history"):
                items = record.history.item
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
                lines.append((record.history.step.num, values))
    return identities, lines


def test_a_run_that_is_continued_is_one_run_with_each_step_once(folder):
    log(folder, range(1, 6))
    log(folder, range(4, 8))
    identities, lines = logged(folder)
    assert len(set(identities)) == 1
    assert identities[0][0] == "digits"
    assert [step for step, _ in lines] == [1, 2, 3, 4, 5, 6, 7]


def test_names_and_values(folder):
    log(folder, [1, 2])
    _, ((_, first), (_, second)) = logged(folder)
    assert first["all/loss"] == 1.5
    assert first["timing/input_stall"] == 0.5
    assert not [name for name in first if "cosine" in name or "load" in name]
    assert second["digit/expert_load/block_1/values"] == [0.5, 0.25, 0.25, 0.0]
    assert second["digit/expert_load/block_1/bins"] == [0, 1, 2, 3, 4]
    assert second["all/cosine/_type"] == "image-file"


def test_another_project_is_another_run(folder):
    log(folder, [1])
    log(folder, [1], project="letters")
    identities, lines = logged(folder)
    assert len({identity for _, identity in identities}) == 2
    assert [step for step, _ in lines] == [1, 1]


@pytest.mark.parametrize("text", ["{", '{"id": 3}', "[]"])
def test_a_damaged_identity_is_named(folder, text):
    (folder.path / "wandb.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"wandb\.json is damaged; delete it to"):
        log(folder, [1])


def test_a_refusal_is_one_clear_line(folder):
    with pytest.raises(ConnectionError, match=r"--wandb a/b: .*WANDB_MODE=offline"):
        log(folder, [1], project="a/b")


def test_a_run_that_has_a_checkpoint_goes_on_without(folder, capsys):
    (folder.path / "first_checkpoint.json").write_text('{"step": 2}')
    log(folder, [1], project="a/b")
    (folder.path / "wandb.json").write_text("{")
    log(folder, [1])
    refused, damaged = capsys.readouterr().err.splitlines()
    assert "nothing is logged to Weights & Biases: --wandb a/b: " in refused
    assert damaged.endswith("begin another run at Weights & Biases; the run goes on")
