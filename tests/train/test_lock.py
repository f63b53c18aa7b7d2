"""Two commands that would train in one folder."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from mtl_jax.train import RunFolderError, lock

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lock of a folder, as from some host."""
    started = []

    def start(host):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path / lock.LOCK, f"4711 {host}\n"],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_another_command_on_this_machine_is_named_at_once(holder, tmp_path):
    process = holder(socket.gethostname())
    message = rf"by another command \(process 4711 of {socket.gethostname()}\); wait"
    with pytest.raises(RunFolderError, match=message), lock.locked(tmp_path):
        raise AssertionError
    # Killed, it holds nothing any more, whatever the file says.
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.locked(tmp_path):
        written = (tmp_path / lock.LOCK).read_text()
    assert written == f"{os.getpid()} {socket.gethostname()}\n"


def test_another_machine_may_be_dead(holder, tmp_path, monkeypatch, capsys):
    process = holder("elsewhere")
    with (
        pytest.raises(RunFolderError, match="process 4711 of elsewhere"),
        lock.locked(tmp_path, lease_seconds=0.1),
    ):
        raise AssertionError

    def sleep(_):
        process.kill()
        process.wait()

    capsys.readouterr()
    monkeypatch.setattr(lock.time, "sleep", sleep)
    with lock.locked(tmp_path):
        pass
    assert capsys.readouterr().err == (
        f"{tmp_path} is being trained by process 4711 of elsewhere, or was when that "
        "died; waits up to 120 s for it\n"
    )


def test_a_link_in_its_place_is_not_followed(tmp_path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("precious")
    (run / lock.LOCK).symlink_to(victim)
    message = r"\.lock is a symbolic link, .* or delete the link"
    with pytest.raises(RunFolderError, match=message), lock.locked(run):
        raise AssertionError
    assert victim.read_text() == "precious"
    (run / lock.LOCK).unlink()
    with lock.locked(run):
        pass


def test_where_there_are_no_locks_there_is_none(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.locked(tmp_path):
        pass
