"""Who follows a run: displays, logs elsewhere, profilers."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self


class Observer(Protocol):
    """Is entered before a run begins, and left after its result is written.

    What it is told is on the host already; it must not wait for the devices.
    """

    def __enter__(self) -> Self:
        """Begins to observe."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Ends, also where the run fails."""
        ...

    def phase(self, step: int, name: str) -> None:
        """The run begins something else than a step, which may take minutes.

        It lasts until the next call of this or of `begin`.

        Args:
          step: Updates done.
          name: ``compiling``, ``evaluating`` or ``saving``.
        """
        ...

    def begin(self, step: int) -> None:
        """A step is about to begin.

        Args:
          step: Number of updates once it is done.
        """
        ...

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        timing: Mapping[str, float],
        evaluated: bool,
    ) -> None:
        """There is a new line of metrics.

        Args:
          step: Updates done.
          metrics: The step's line of metrics, as in ``metrics.jsonl``.
          timing: The step's line of timings, as in ``timings.jsonl``.
          evaluated: Whether the metrics hold those of an evaluation.
        """
        ...
