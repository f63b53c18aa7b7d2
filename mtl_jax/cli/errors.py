"""What is wrong with a user's input: one line, and a status of its own."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import NoReturn

from rich.console import Console

USER_ERROR = 2
NUMERICAL_FAULT = 3


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


@contextlib.contextmanager
def storage_is_quiet() -> Iterator[None]:
    """Keeps what Orbax and its storage print of the faults that they raise as well.

    They log tracebacks, and their threads print more when a save fails in the middle.
    An error that ends this leaves it so: what is left of a save may still fail then.
    """
    before, unraisable_before = sys.excepthook, sys.unraisablehook

    def hook(*exception) -> None:
        # Threads of Python have a hook of their own: these are the storage's.
        if threading.current_thread() is threading.main_thread():
            before(*exception)

    def unraisable_hook(unraisable) -> None:
        # Errors of Python's own name the object that they come from.
        if unraisable.object is not None:
            unraisable_before(unraisable)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.excepthook, sys.unraisablehook = hook, unraisable_hook
    try:
        yield
    except BaseException:
        warnings.filterwarnings("ignore", "coroutine .* was never", RuntimeWarning)
        raise
    sys.excepthook, sys.unraisablehook = before, unraisable_before
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def fail(message: str, status: int = USER_ERROR) -> NoReturn:
    """Says in one line what is wrong, and exits."""
    # What a terminal would obey, or no encoding has, comes from arguments and files.
    line = "".join(
        letter if letter.isprintable() else repr(letter)[1:-1]
        for letter in " ".join(message.split())
    )
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"mtl-jax: error: {line}"
    )
    sys.exit(status)
