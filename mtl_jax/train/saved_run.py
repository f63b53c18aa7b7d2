"""What can be done with the checkpoints of a run, whose folder is only read."""

from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.description import describe
from mtl_jax.train.evaluate import make_evaluate
from mtl_jax.train.integrity import DamagedCheckpointError
from mtl_jax.train.loop import CHECKPOINTS
from mtl_jax.train.program import Program
from mtl_jax.train.result import task_results
from mtl_jax.train.run_folder import RunFolder, RunFolderError
from mtl_jax.train.state import TrainState


def evaluate_run(
    program: Program, folder: RunFolder, step: int | None
) -> tuple[int, dict]:
    """Evaluates a checkpoint on all test records.

    Args:
      program: The run's program.
      folder: The run's folder.
      step: Which checkpoint; the newest by default.

    Returns:
      The step and ``{task: {metric: value}}``.

    Raises:
      RunFolderError: If there is no such checkpoint, or it is damaged or of another
        config.
    """
    state = restore_run(program, folder, step)
    scores = make_evaluate(program)(state.variables, None)
    return int(state.step), task_results(program.experiment, scores)


def restore_run(program: Program, folder: RunFolder, step: int | None) -> TrainState:
    """The state at a checkpoint of a run.

    Args:
      program: The run's program.
      folder: The run's folder.
      step: Which checkpoint; by default the newest that is whole, and those that are
        damaged are named on stderr.

    Raises:
      RunFolderError: If there is no such checkpoint, or it is damaged or of another
        config.
    """
    directory = folder.path / CHECKPOINTS
    if not directory.is_dir():
        raise RunFolderError(f"{folder.path} has no checkpoints yet; train it first")
    description = describe(program, folder.read_json("config.json"))
    checkpoints = Checkpoints(directory, description, read_only=True)
    try:
        if step is None:
            newest = checkpoints.restore_newest(program.fresh_state)
            if newest is None:
                raise RunFolderError(f"{directory} is empty; train the run first")
            return newest[1]
        if step not in checkpoints.steps:
            raise RunFolderError(
                f"{directory} has no checkpoint {step}; it has {checkpoints.steps}"
            )
        try:
            return checkpoints.restore_state(step, program.fresh_state())
        except DamagedCheckpointError as error:
            if step in checkpoints.list_again():
                raise
            raise RunFolderError(
                f"{directory} has no checkpoint {step} any more; it has "
                f"{checkpoints.steps}"
            ) from error
    finally:
        checkpoints.close()
