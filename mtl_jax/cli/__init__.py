"""The command line: ``mtl-jax train|eval|export|extract|show|compile|...``."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from mtl_jax.cli import pages, plans, runs, training, watch
from mtl_jax.cli.errors import fail

STATUS = 128
"""A process that a signal stopped ends with this plus the signal's number."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 on success, 2 for a user's mistake.

    Ctrl-C ends it by 130, wherever it is; `train` listens to signals itself once it has
    something to save.
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except KeyboardInterrupt:
        fail("interrupted", STATUS + signal.SIGINT)
    except BrokenPipeError:
        # Whoever reads the output, such as `head`, has seen enough. Python would
        # complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mtl-jax", description="Multitask learning at scale in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (training, watch, runs, plans, pages):
        module.add(commands)
    return parser
