"""Signals that ask a run to stop: it saves first, and ends with a status of theirs."""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import jax

from mtl_jax.sharding.leaving import preempted

STATUS = 128
"""A process that a signal stopped ends with this plus the signal's number."""


class StoppedError(Exception):
    """A run was saved and stopped, as a signal asked.

    Attributes:
      number: The signal's number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """SIGTERM and SIGINT while a run trains; to be entered in the main thread.

    In a single process, the first signal inside `held` is only noted, and the run asks
    for it by `stops_after`. Any other, such as a second, or one while the step is being
    compiled, ends the process at once, whatever it does at the moment.

    Several processes leave SIGTERM to JAX, which lets all of them stop after the same
    step. A first SIGINT is passed on to it as SIGTERM; a second ends the process at
    once.

    One that is not entered hears no signals.
    """

    def __init__(self):
        self._noted: int | None = None
        self._holding = False
        self._lock = threading.Lock()
        self._before = {}

    def __enter__(self) -> Self:
        several = jax.distributed.is_initialized()
        numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
        # Python itself looks at signals only between two operations of the main
        # thread, and compilation is a single one of minutes: another thread is told.
        receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._former_sender = signal.set_wakeup_fd(
            self._sender.fileno(), warn_on_full_buffer=False
        )
        for number in numbers:
            self._before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(
            target=self._listen, args=(receiver, numbers), daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(self._former_sender)
        # The thread reads the end of its stream, and ends.
        self._sender.close()

    def _listen(self, receiver: socket.socket, numbers: list[signal.Signals]) -> None:
        with receiver:
            while received := receiver.recv(1):
                if received[0] in numbers:
                    self._take(received[0])

    def _take(self, number: int) -> None:
        with self._lock:
            several = jax.distributed.is_initialized()
            if self._noted is not None or not (self._holding or several):
                _end_at_once(number)
            self._noted = number
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While inside, the run has something to save, and will.

        Raises:
          StoppedError: At the end, where a single process was told to stop and all is
            saved.
        """
        with self._lock:
            self._holding = True
        try:
            yield
        finally:
            with self._lock:
                self._holding = False
        if self.interrupted():
            assert self._noted is not None
            raise StoppedError(self._noted)

    def interrupted(self) -> bool:
        """Whether this process, which is the only one, is to stop.

        Of several, none may leave alone what they compute together.
        """
        return self._noted is not None and not jax.distributed.is_initialized()

    def stops_after(self, step: int) -> int | None:
        """The signal for which the run is to save and stop after a step, if any.

        To be asked after every step, by all processes.

        Args:
          step: Number of updates done.
        """
        if jax.distributed.is_initialized():
            return (self._noted or signal.SIGTERM) if preempted(step) else None
        return self._noted


def _end_at_once(number: int) -> None:
    """Ends the process, whatever its threads do or wait for."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    name = signal.Signals(number).name
    text = (
        f"{show_cursor}\nended at once by {name}; the same command continues from the "
        "last checkpoint\n"
    )
    # Nobody may read it, and then writing would wait.
    if select.select([], [2], [], 0)[1]:
        os.write(2, text.encode())
    os._exit(STATUS + number)
