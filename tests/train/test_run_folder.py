import os
import tracemalloc

import pytest

from mtl_jax.train import RunFolder, RunFolderError


def whole(line):
    return line


def test_a_log_is_cut_after_a_step(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.truncate("log", 3, whole) == []
    for step in (1, 3, 5):
        folder.append("log", {"step": step, "value": float("nan")})
    with (tmp_path / "log").open("a") as file:
        file.write('{"step": 6, "val')
    kept = [{"step": 1, "value": None}, {"step": 3, "value": None}]
    assert folder.truncate("log", 4, whole) == kept
    assert folder.truncate("log", 4, whole) == kept
    assert folder.truncate("log", 1, whole) == kept[:1]
    assert (tmp_path / "log").read_text() == '{"step": 1, "value": null}\n'


def test_of_a_long_log_only_what_is_asked_for_is_kept(tmp_path):
    """Each line is read once, and one at a time."""
    line = b'{"step": 1, "text": "%s"}\n' % (b"x" * 1000)
    with (tmp_path / "log").open("wb") as file:
        file.writelines([line] * 8000)
        file.write(b'{"step": 9}\n')
    folder, steps = RunFolder(tmp_path), []
    tracemalloc.start()
    try:
        kept = folder.truncate("log", 1, lambda line: steps.append(line["step"]))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert kept == []
    assert steps == [1] * 8000
    # Of the eight megabytes; the list of steps is here.
    assert most < 300_000
    assert (tmp_path / "log").stat().st_size == 8000 * len(line)


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"[]", b"{}", b'{"step": "x"}', b"3", b"\0", b"[" * 100_000),
        # One bit of a letter that is another.
        b'{"step": 2, "\xecoss": 1}',
    ],
)
def test_a_damaged_line_is_named_and_nothing_cut(tmp_path, line):
    content = b'{"step": 1}\n' + line + b"\n"
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"line 2 of .*log is damaged"):
        RunFolder(tmp_path).truncate("log", 4, whole)
    assert (tmp_path / "log").read_bytes() == content


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\x00"])
def test_a_damaged_document_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"a\.json is not") as error:
        RunFolder(tmp_path).read_json("a.json")
    assert "mend this file or delete it alone" in str(error.value)


def test_a_document_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    folder, done = RunFolder(tmp_path), []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(number):
        done.append(("on the disk", os.fstat(number).st_size))
        fsync(number)

    def noted_replace(*paths):
        done.append(("in its place",))
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    folder.write_json("a.json", {"a": 1})
    size = (tmp_path / "a.json").stat().st_size
    assert done == [("on the disk", size), ("in its place",)]
    folder.write_json("a.json", {"a": 2}, durable=False)
    assert len(done) == 3
    assert folder.read_json("a.json") == {"a": 2}


def test_a_process_that_does_not_write_leaves_the_folder_alone(tmp_path):
    absent = tmp_path / "absent"
    assert RunFolder(absent, writes=False).read_json("a.json") is None
    assert not absent.exists()
    (tmp_path / "log").write_text('{"step": 1}\n{"step": 2}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    folder = RunFolder(tmp_path, writes=False)
    folder.write_json("a.json", {})
    folder.append("log", {"step": 3})
    assert folder.truncate("log", 1, whole) == [{"step": 1}]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_is_written_through_links(tmp_path):
    """A stranger's folder, whose names lead to a file of ours."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text('{"step": 1}\n{"step": 9}\n')
    before = victim.read_bytes()
    for name in (".writable", ".a.json.tmp", "log", "b.json"):
        (run / name).symlink_to(victim)
    (run / "new").symlink_to(tmp_path / "made")
    folder = RunFolder(run)
    folder.write_json("a.json", {"a": 1})
    folder.write_json("b.json", {"b": 1})
    for name in ("log", "new"):
        with pytest.raises(RunFolderError, match=f"{name} is a symbolic link, through"):
            folder.append(name, {"step": 2})
        with pytest.raises(RunFolderError, match="is a symbolic link, through which"):
            folder.truncate(name, 4, whole)
    assert victim.read_bytes() == before
    assert not (tmp_path / "made").exists()
    assert folder.read_json("b.json") == {"b": 1}
    assert not (run / "b.json").is_symlink()


def test_a_pipe_in_the_place_of_a_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="No such device"):
        RunFolder(tmp_path).append("log", {"step": 1})


def test_to_try_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    RunFolder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def sparse(path):
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.parametrize("make", [os.mkfifo, sparse])
def test_what_a_run_reads_that_has_no_end(tmp_path, make):
    folder = RunFolder(tmp_path)
    for name in ("a.json", "log"):
        make(tmp_path / name)
    with pytest.raises(
        RunFolderError, match=r"a\.json .* \(it (is no ordinary|has 1,0)"
    ):
        folder.read_json("a.json")
    with pytest.raises(
        RunFolderError, match=r"log is (a pipe; delete it|damaged; mend)"
    ):
        folder.truncate("log", 3, whole)
