"""The command line in processes of its own."""

import contextlib
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def in_a_process(*arguments, folder=ROOT, cwd=None):
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_mistake(finished, expected):
    assert finished.returncode == 2, finished.stderr
    assert re.fullmatch(r"mtl-jax: error: .+\n", finished.stderr)
    assert expected in finished.stderr
    assert finished.stdout == ""


def free_port():
    """A port that nobody listens on, and that no outgoing connection is given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def in_two_processes(*arguments, cwd):
    """Runs a command in two processes of four devices each; returns both, ended."""
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    address = ("--coordinator", f"localhost:{free_port()}", "--num-processes", "2")
    both = [
        subprocess.Popen(
            [*command, "--devices", "4", *address, "--process-id", str(i)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        output = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *text)
        for process, text in zip(both, output, strict=True)
    ]
