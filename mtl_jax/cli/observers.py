"""Options of ``mtl-jax train`` about who follows a run."""

import argparse
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl_jax.report.live import newest_checkpoint

# Option -> package that it needs, and the extra that installs it.
NEEDS = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb", "wandb"),
}


def add_observers(parser: argparse.ArgumentParser) -> None:
    """Who follows the run besides the display in the terminal."""
    group = parser.add_argument_group("watching")
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write metrics to DIR/tensorboard",
    )
    group.add_argument(
        "--wandb", metavar="PROJECT", help="also send metrics to Weights & Biases"
    )
    group.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace the steps from START to before STOP into DIR/profile",
    )


def check_observers(options: argparse.Namespace) -> None:
    """Checks what can be checked before anything is built.

    Raises:
      ValueError: If an option lacks its package, or ``--profile`` names no steps.
    """
    for option, (package, extra) in NEEDS.items():
        if vars(options)[option] and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--{option} needs the package {package}: "
                f"pip install 'mtl_jax[{extra}]'"
            )
    if options.wandb is not None and not options.wandb.strip():
        raise ValueError("--wandb is empty; give the name of a project")
    if options.profile is not None:
        _steps(options.profile)


def check_profile(text: str | None, num_steps: int, workdir: Path) -> None:
    """Checks that a run has the steps that are to be traced.

    Where it has done them already there will be no trace, but it goes on: the command
    is that of its start, which a cluster gives again.

    Args:
      text: Value of ``--profile``, if any.
      num_steps: Length of the run.
      workdir: Its folder, if there is one already.

    Raises:
      ValueError: If it has not.
    """
    if text is None or (workdir / "result.json").exists():
        return
    start, stop = _steps(text)
    done = newest_checkpoint(workdir) or 0
    if stop - 1 > num_steps:
        raise ValueError(
            f"--profile is {text}, but the run ends with step {num_steps}: STOP must "
            f"be at most {num_steps + 1}"
        )
    if start <= done:
        print(
            f"no trace: --profile is {text}, and the run continues from step {done}",
            file=sys.stderr,
        )


def make_observers(
    options: argparse.Namespace,
    name: str,
    document: Mapping[str, Any],
    experiment: Any,
    folder: Any,
) -> list[Any]:
    """All who follow a run, in this process.

    Args:
      options: Of the command line.
      name: Name of the run's config.
      document: Content of its ``config.json``.
      experiment: The `mtl_jax.train.Experiment`.
      folder: The `mtl_jax.train.RunFolder`.
    """
    from mtl_jax import train
    from mtl_jax.sharding import distributed
    from mtl_jax.train.heartbeat import Heartbeat

    if not distributed.is_main():
        return []
    tasks = [task.name for task in experiment.tasks]
    headlines = {task.name: task.metrics[0].name for task in experiment.tasks}
    stops = (KeyboardInterrupt, train.StoppedError)
    observers: list[Any] = [Heartbeat(folder, experiment.num_steps, headlines, stops)]
    if options.tensorboard:
        from mtl_jax.train.tensorboard import TensorBoard

        observers.append(TensorBoard(folder.path / "tensorboard", tasks))
    if options.wandb:
        from mtl_jax.train.weights_and_biases import WeightsAndBiases

        observers.append(
            WeightsAndBiases(folder, options.wandb, name, document["fields"], tasks)
        )
    if options.profile is not None:
        from mtl_jax.train.profile import Profile

        start, stop = _steps(options.profile)
        observers.append(Profile(folder.path / "profile", start, stop))
    return observers


def _steps(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[0-9]{1,15}:[0-9]{1,15}", text):
        raise ValueError(
            f"--profile is {text!r}; it must be START:STOP, such as 100:103"
        )
    start, stop = map(int, text.split(":"))
    if start < 1:
        raise ValueError(f"--profile is {text}; the first step of a run is 1")
    if start >= stop:
        raise ValueError(
            f"--profile is {text}, which is no step: STOP is the first that is not "
            f"traced, at least {start + 1} here"
        )
    return start, stop
