"""How a process of several ends: with the others, or as one of them is lost."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

LOST = 75
"""Status of a process that ends because another one is lost: try again."""

_LOST_TEXT = re.compile(
    r"Gloo .* failed|Connection (reset|closed|refused)|Socket closed|heartbeat|NCCL"
    r"|^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)"
)
_ADVICE = (
    "see what the others print; the same command in all processes continues from the "
    "last checkpoint"
)


def preempted(step: int) -> bool:
    """Whether all processes are to save and stop after this step.

    They are when a cluster is about to take one of their machines away and says so by
    SIGTERM. To be asked after every step, by all processes.

    Args:
      step: Number of updates done.
    """
    # A single process has no such service. Nor have those that were told by
    # JAX_ENABLE_PREEMPTION_SERVICE to do without.
    served = jax.distributed.is_initialized() and (
        jax.config.jax_enable_preemption_service  # type: ignore[attr-defined]
    )
    return served and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ends a process of several as soon as what is inside fails, and says why.

    At its end Python would wait for the other processes, who wait for this one. Where
    it fails as another one is lost, that takes one line, and the status is `LOST`.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        status: object = 1
        if isinstance(error, SystemExit):
            status = error.code
        elif isinstance(error, jax.errors.JaxRuntimeError) and _LOST_TEXT.search(
            str(error)
        ):
            status = LOST
            reason = str(error).partition("\n")[0][:200]
            print(
                f"mtl-jax: error: another process is lost ({reason}); {_ADVICE}",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _explain(_: int) -> None:
    line = (
        "mtl-jax: error: JAX aborts this process, most likely as another one is lost; "
        f"{_ADVICE}\n"
    )
    os.write(2, line.encode())


def explain_aborts() -> None:
    """Adds a line to what JAX says when it aborts this process.

    It does where another process gives no sign of life any more, from a thread of its
    own and with pages of text, and does not ask Python.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _explain)
