"""A run's metrics at Weights & Biases."""

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import wandb  # type: ignore[import-not-found]

from mtl_jax.train.integrity import FIRST
from mtl_jax.train.metric_values import cosine_picture, split_by_shape
from mtl_jax.train.run_folder import IDENTITY, RunFolder, RunFolderError
from mtl_jax.train.telling import tell

COSINE = "all/cosine"


class WeightsAndBiases:
    """Sends each line of metrics to Weights & Biases.

    Names are those in ``metrics.jsonl``, and those of ``timings.jsonl`` after
    ``timing/``. At evaluations, the loads of experts are histograms with a bar for
    each expert, and the cosines of task gradients a picture.

    The run's identity is kept in ``wandb.json``: a run that is continued is the same
    there, and no step is sent twice. Source code is not sent. If logging fails later
    on, that is reported, no more is logged, and the run goes on.

    Args:
      folder: The run's folder.
      project: The project's name.
      name: The run's name.
      config: What the run was configured with, by dotted path.
      tasks: Names of the tasks, in the order of the experiment.
    """

    def __init__(
        self,
        folder: RunFolder,
        project: str,
        name: str,
        config: Mapping[str, Any],
        tasks: Sequence[str],
    ):
        self._folder, self._project, self._name = folder, project, name
        self._config, self._tasks = dict(config), tuple(tasks)
        self._identity: dict[str, Any] = {}
        self._run: Any = None
        self._next: int = 0

    def __enter__(self) -> Self:
        """Begins the run there, or goes on with it.

        A run that has a checkpoint goes on without this log where that fails.

        Raises:
          ConnectionError: If Weights & Biases cannot be reached, or refuses.
          RunFolderError: If ``wandb.json`` is damaged.
        """
        try:
            self._begin()
        except (ConnectionError, RunFolderError) as error:
            if not (self._folder.path / FIRST).exists():
                raise
            tell(f"nothing is logged to Weights & Biases: {error}; the run goes on")
        return self

    def _begin(self) -> None:
        saved = self._identity = self._known_identity()
        try:
            run = wandb.init(
                project=self._project,
                name=self._name,
                id=saved["id"],
                resume="allow",
                dir=self._folder.path,
                config=self._config,
                settings=wandb.Settings(
                    # The terminal shows a live view.
                    console="off",
                    quiet=True,
                    disable_git=True,
                    save_code=False,
                ),
            )
        except (wandb.Error, ValueError) as error:
            raise ConnectionError(
                f"--wandb {self._project}: {error}; WANDB_MODE=offline logs to the run "
                "folder alone"
            ) from error
        # Offline nobody else knows what was logged before.
        self._next = saved.get("next_step", 0) if run.offline else run.step
        self._folder.write_json(IDENTITY, self._identity)
        self._run = run

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._run is None:
            return
        with self._reporting():
            self._run.finish(exit_code=int(kind is not None))

    def _known_identity(self) -> dict[str, Any]:
        """The identity that the run has there, or a new one."""
        path = self._folder.path / IDENTITY
        try:
            saved = self._folder.read_json(IDENTITY) or {}
            known, after = saved.get("id"), saved.get("next_step", 0)
            damaged = saved and not (isinstance(known, str) and type(after) is int)
        except RunFolderError:
            saved, damaged = {}, True
        if damaged:
            raise RunFolderError(
                f"{path} is damaged; delete it to begin another run at Weights & Biases"
            )
        if saved.get("project") != self._project:
            saved = {"project": self._project, "id": secrets.token_hex(4)}
        return saved

    def phase(self, step: int, name: str) -> None:
        """Nothing of it is logged."""

    def begin(self, step: int) -> None:
        """Nothing is logged of a step that is not done."""

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        timing: Mapping[str, float],
        evaluated: bool,
    ) -> None:
        """Logs the line of a step, unless an earlier part of the run did."""
        if self._run is None or step < self._next:
            return
        with self._reporting():
            self._run.log(self._values(metrics, timing, evaluated), step=step)
            self._next = step + 1
            if self._run.offline:
                identity = self._identity | {"next_step": self._next}
                self._folder.write_json(IDENTITY, identity)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Lets the run go on without this log where it fails."""
        try:
            yield
        except (wandb.Error, OSError) as error:
            self._run = None
            tell(f"cannot log to Weights & Biases any more: {error}; the run goes on")

    def _values(
        self, metrics: Mapping[str, Any], timing: Mapping[str, float], evaluated: bool
    ) -> dict[str, Any]:
        scalars, vectors, matrices = split_by_shape(metrics)
        times = {f"timing/{name}": v for name, v in timing.items() if name != "step"}
        values: dict[str, Any] = {**scalars, **times}
        if evaluated:
            for name, vector in vectors.items():
                if np.isfinite(vector).all():
                    ends = np.arange(len(vector) + 1)
                    values[name] = wandb.Histogram(np_histogram=(vector, ends))
            if COSINE in matrices:
                picture = cosine_picture(matrices[COSINE], self._tasks)
                values[COSINE] = wandb.Image(picture)
        return values
