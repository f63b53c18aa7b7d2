"""What is wrong with a user's input: one line, and a status of its own."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from rich.console import Console

USER_ERROR = 2


@contextlib.contextmanager
def user_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, OSError),
) -> Iterator[None]:
    """Turns what is wrong with the user's input into one line and status 2.

    Args:
      kinds: Exceptions that stand for it, by default those of the checks. Once all is
        checked and computing begins, another ValueError is a fault of the program,
        and its traceback should be seen.
    """
    try:
        yield
    except kinds as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Says in one line what is wrong, and exits."""
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"mtl-jax: error: {line}"
    )
    sys.exit(USER_ERROR)
