import pytest

from mtl_jax.train import RunFolder, RunFolderError


def test_a_log_is_cut_after_a_step(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.truncate("log", 3) == []
    for step in (1, 3, 5):
        folder.append("log", {"step": step, "value": float("nan")})
    with (tmp_path / "log").open("a") as file:
        file.write('{"step": 6, "val')
    kept = [{"step": 1, "value": None}, {"step": 3, "value": None}]
    assert folder.truncate("log", 4) == kept
    assert folder.truncate("log", 4) == kept
    assert folder.truncate("log", 1) == kept[:1]
    assert (tmp_path / "log").read_text() == '{"step": 1, "value": null}\n'


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"[]", b"{}", b'{"step": "x"}', b"3", b"\0", b"[" * 100_000),
        # One bit of a letter that is another.
        b'{"step": 2, "\xecoss": 1}',
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "log").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(RunFolderError, match=r"line 2 of .*log is damaged"):
        RunFolder(tmp_path).truncate("log", 4)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\x00"])
def test_a_damaged_document_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"a\.json is not"):
        RunFolder(tmp_path).read_json("a.json")


def test_a_process_that_does_not_write_leaves_the_folder_alone(tmp_path):
    absent = tmp_path / "absent"
    assert RunFolder(absent, writes=False).read_json("a.json") is None
    assert not absent.exists()
    (tmp_path / "log").write_text('{"step": 1}\n{"step": 2}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    folder = RunFolder(tmp_path, writes=False)
    folder.write_json("a.json", {})
    folder.append("log", {"step": 3})
    assert folder.truncate("log", 1) == [{"step": 1}]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
