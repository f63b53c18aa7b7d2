"""Commands in processes of their own that start at once: all is imported once.

    python forks.py

Reads lines of JSON ``{"arguments": [...], "folder": ..., "output": ...}``, and runs
each as a command line in a fork, in that folder, with what it prints in that file.
Prints the number of the fork's process and, when that has ended, its status as
`subprocess` has it.
"""

import json
import os
import sys

from mtl_jax import cli, configuration, train  # noqa: F401
from mtl_jax.sharding import distributed  # noqa: F401


def run(request):
    """Becomes the command; does not return."""
    status = 1
    try:
        os.chdir(request["folder"])
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        cli.main(request["arguments"])
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
