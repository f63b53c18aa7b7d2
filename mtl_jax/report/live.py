"""What is to be seen of a run while it goes on, from the files in its folder."""

import collections
import dataclasses
import math
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.report.log_tail import LogTail, read_document

MAX_POINTS = 500
MAX_SCALARS = 5000
MAX_TASKS = 500

QUIET_SECONDS = 60.0
"""A run that trains and says nothing for so long gives no sign of life."""

QUIET_STEPS = 10
"""So many steps may pass without a sign of life where they take long."""

GONE_SECONDS = 15.0
"""How long a process that cannot be found is given the benefit of the doubt."""

Records = Sequence[Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class TaskView:
    """One task of a run.

    Attributes:
      name: The task's.
      losses: Its last training losses; NaN where it was not finite.
      metric: Name of the test metric that stands for it.
      scores: That metric's last values.
      dead_experts: Share of experts that got no token; None without experts.
      left_out: Steps that left it out because of numbers that were not finite.
    """

    name: str
    losses: Sequence[float]
    metric: str
    scores: Sequence[float]
    dead_experts: float | None
    left_out: float


@dataclasses.dataclass(frozen=True)
class RunView:
    """A run at one moment; what is unknown is None or empty.

    Attributes:
      path: Its folder.
      status: What it does, or what became of it.
      mood: ``waiting``, ``working``, ``quiet``, ``lost`` or ``done``.
      config: Name of the config.
      step: Updates done.
      num_steps: Length of the run.
      evaluated_at: Step of the newest evaluation.
      saved_at: Step of the newest checkpoint.
      seconds_per_step: Of late, with evaluation and saving.
      examples_per_second: Of late, while training.
      input_stall: Share of the time spent waiting for data.
      losses: Sum of the task losses of late.
      conflict_rates: Share of pairs of tasks with conflicting gradients of late.
      skipped_steps: Steps that were skipped because of numbers that were not finite.
      tasks: The tasks, in the order of the config where it is known.
      problems: What is wrong with the folder, a line each.
    """

    path: Path
    status: str
    mood: str
    config: str = ""
    step: int | None = None
    num_steps: int | None = None
    evaluated_at: int | None = None
    saved_at: int | None = None
    seconds_per_step: float | None = None
    examples_per_second: float | None = None
    input_stall: float | None = None
    losses: Sequence[float] = ()
    conflict_rates: Sequence[float] = ()
    skipped_steps: float = 0.0
    tasks: Sequence[TaskView] = ()
    problems: Sequence[str] = ()

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the speed of late."""
        if self.num_steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.num_steps - (self.step or 0)) * self.seconds_per_step


class RunFollower:
    """Looks at a run's folder again and again, at the cost of what is new in it.

    Args:
      path: The folder, which need not be there yet.
    """

    def __init__(self, path: Path):
        self._path = path
        self._metrics = LogTail(path / "metrics.jsonl")
        self._timings = LogTail(path / "timings.jsonl")
        self._records = collections.deque(maxlen=MAX_POINTS)
        self._evaluations = collections.deque(maxlen=MAX_POINTS)
        self._times = collections.deque(maxlen=MAX_POINTS)

    def look(self, now: float) -> RunView:
        """The run as it is now, whatever its folder looks like.

        Args:
          now: Seconds since 1970.
        """
        problems: list[str] = []
        self._read_logs(problems)
        documents = {}
        for name in ("heartbeat", "result", "config"):
            try:
                documents[name] = read_document(self._path / f"{name}.json")
            except ValueError as error:
                problems.append(str(error))
                documents[name] = {}
        return self._view(documents, problems, now)

    def _read_logs(self, problems: list[str]) -> None:
        try:
            replaced, records = self._metrics.read()
            if replaced:
                self._records.clear()
                self._evaluations.clear()
            for record in map(_scalars, records):
                self._records.append(record)
                if any(name.endswith("/test_loss") for name in record):
                    self._evaluations.append(record)
            replaced, times = self._timings.read()
            if replaced:
                self._times.clear()
            self._times.extend(map(_scalars, times))
        except ValueError as error:
            problems.append(str(error))
        for log, name in ((self._metrics, "metrics"), (self._timings, "timings")):
            if log.damaged:
                what = "a line" if log.damaged == 1 else f"{log.damaged} lines"
                problems.append(f"{what} of {name}.jsonl cannot be read")

    def _view(
        self, documents: Mapping[str, Mapping], problems: list[str], now: float
    ) -> RunView:
        heartbeat, result = documents["heartbeat"], documents["result"]
        fields = _mapping(documents["config"].get("fields"))
        steps = [_last(self._records, "step"), _number(heartbeat.get("step"))]
        known = [int(step) for step in steps if step is not None]
        step = max(known) if known else None
        timing = self._times[-1] if self._times else {}
        speed = _seconds_per_step(self._times)
        lengths = (heartbeat, result, fields)
        lengths = [_number(document.get("num_steps")) for document in lengths]
        config = documents["config"].get("config")
        evaluated = _last(self._evaluations, "step")
        mood, status = _status(self._path, heartbeat, bool(result), step, timing, now)
        return RunView(
            path=self._path,
            status=status,
            mood=mood,
            config=config if isinstance(config, str) else "",
            step=step,
            num_steps=next((int(n) for n in lengths if n is not None), None),
            evaluated_at=None if evaluated is None else int(evaluated),
            saved_at=newest_checkpoint(self._path),
            seconds_per_step=speed,
            examples_per_second=timing.get("examples_per_second"),
            input_stall=timing.get("input_stall"),
            losses=_series(self._records, "all/loss"),
            conflict_rates=_series(self._records, "all/conflict_rate"),
            skipped_steps=_sum(self._records, "all/skipped_steps"),
            tasks=self._tasks(heartbeat, result),
            problems=tuple(problems),
        )

    def _tasks(self, heartbeat: Mapping, result: Mapping) -> tuple[TaskView, ...]:
        headlines = dict(_mapping(heartbeat.get("headlines")))
        for task, entry in _mapping(result.get("tasks")).items():
            headlines[task] = _mapping(entry).get("headline")
        logged = {
            name.removesuffix("/loss"): None
            for name in (self._records[-1] if self._records else ())
            if name.endswith("/loss") and name != "all/loss"
        }
        names = list(dict.fromkeys([*headlines, *logged]))[:MAX_TASKS]
        return tuple(self._task(name, headlines.get(name)) for name in names)

    def _task(self, name: str, headline: Any) -> TaskView:
        metric = headline if isinstance(headline, str) else "test_loss"
        return TaskView(
            name=name,
            losses=_series(self._records, f"{name}/loss"),
            metric=metric,
            scores=_series(self._evaluations, f"{name}/{metric}"),
            dead_experts=_last(self._records, f"{name}/dead_experts"),
            left_out=_sum(self._records, f"{name}/left_out"),
        )


def _status(
    path: Path,
    heartbeat: Mapping[str, Any],
    finished: bool,
    step: int | None,
    timing: Mapping[str, float],
    now: float,
) -> tuple[str, str]:
    """Mood and status of a run."""
    state, time = heartbeat.get("state"), _number(heartbeat.get("time"))
    since = _number(heartbeat.get("since"))
    if finished:
        return "done", "finished"
    if not path.is_dir():
        return "waiting", "waiting: there is no such folder yet"
    if not isinstance(state, str) or time is None or since is None:
        if step is None:
            return "waiting", "waiting for the run to begin"
        return "quiet", "no heartbeat: whether it goes on is not known"
    age, at = max(0.0, now - time), "" if step is None else f" at step {step:,}"
    if state == "finished":
        return "done", "finished"
    if state == "stopped":
        return "done", f"stopped{at}, {duration(age)} ago; its command continues it"
    if state == "failed":
        return "lost", f"failed{at}, {duration(age)} ago: {heartbeat.get('error')}"
    if age > GONE_SECONDS and _is_gone(heartbeat):
        return "lost", f"its process is gone{at}, {duration(age)} after its last sign"
    if state != "training":
        lasts = max(0.0, now - since)
        mood = "quiet" if lasts > 10 * QUIET_SECONDS else "working"
        return mood, f"{state} for {duration(lasts)}"
    patience = max(QUIET_SECONDS, QUIET_STEPS * timing.get("seconds_per_step", 0.0))
    if age > patience:
        return "lost", f"no sign of life for {duration(age)}"
    return "working", f"training, sign of life {duration(age)} ago"


def _is_gone(heartbeat: Mapping[str, Any]) -> bool:
    """Whether the run was on this machine and its process is no more."""
    pid, host = heartbeat.get("pid"), heartbeat.get("host")
    # Elsewhere than on POSIX systems this signal ends a process.
    if os.name != "posix" or host != socket.gethostname() or type(pid) is not int:
        return False
    try:
        os.kill(max(pid, 1), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        # It is another user's, or a number that no process has.
        return False
    return False


def duration(seconds: float) -> str:
    """A duration in whole seconds, minutes, hours or days."""
    for size, unit, until in ((1, "s", 100), (60, "min", 100), (3600, "h", 72)):
        if seconds < size * until:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def newest_checkpoint(path: Path) -> int | None:
    """Step of the newest checkpoint in a run's folder, None without any."""
    try:
        names = os.listdir(path / "checkpoints")
    except OSError:
        return None
    steps = [int(name) for name in names if name.isdecimal() and len(name) < 16]
    return max(steps, default=None)


def _seconds_per_step(times: Records) -> float | None:
    """Of the wall time between the first and the last line that are kept."""
    timed = [line for line in times if "wall_time_seconds" in line]
    if len(timed) >= 2:
        first, last = timed[0], timed[-1]
        steps = last["step"] - first["step"]
        seconds = last["wall_time_seconds"] - first["wall_time_seconds"]
        if steps > 0 and seconds > 0:
            return seconds / steps
    return _last(times, "seconds_per_step")


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line; NaN for those that were not finite."""
    kept = {}
    for name, value in record.items():
        if len(kept) == MAX_SCALARS:
            break
        if value is None:
            kept[name] = math.nan
        elif isinstance(value, int | float):
            number = _number(value)
            kept[name] = math.nan if number is None else number
    return kept


def _number(value: Any) -> float | None:
    """A number of a size that can be shown, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e15 else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _series(records: Iterable[Mapping[str, float]], name: str) -> tuple[float, ...]:
    return tuple(record[name] for record in records if name in record)


def _last(records: Records, name: str) -> float | None:
    for record in reversed(records):
        if name in record and math.isfinite(record[name]):
            return record[name]
    return None


def _sum(records: Iterable[Mapping[str, float]], name: str) -> float:
    return sum(value for value in _series(records, name) if math.isfinite(value))
