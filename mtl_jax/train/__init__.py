"""Training: objective, task gradients, step, loop, checkpoints, evaluation."""

from mtl_jax.train.description import saved_config
from mtl_jax.train.experiment import Experiment, MeshShape
from mtl_jax.train.export import export_task, write_export
from mtl_jax.train.fault_log import NumericalFaultError
from mtl_jax.train.initialize import check_initialize
from mtl_jax.train.lock import locked
from mtl_jax.train.loop import CHECKPOINTS, train
from mtl_jax.train.optimizer import adamw, sgd
from mtl_jax.train.program import Program, build_program
from mtl_jax.train.rescue import Fallback, UnwritableError, check_fallback
from mtl_jax.train.run_folder import RunFolder, RunFolderError
from mtl_jax.train.saved_run import evaluate_run, restore_run
from mtl_jax.train.stopping import STATUS, StoppedError, StopSignals
from mtl_jax.train.validation import validate

__all__ = [
    "CHECKPOINTS",
    "STATUS",
    "Experiment",
    "Fallback",
    "MeshShape",
    "NumericalFaultError",
    "Program",
    "RunFolder",
    "RunFolderError",
    "StopSignals",
    "StoppedError",
    "UnwritableError",
    "adamw",
    "build_program",
    "check_fallback",
    "check_initialize",
    "evaluate_run",
    "export_task",
    "locked",
    "restore_run",
    "saved_config",
    "sgd",
    "train",
    "validate",
    "write_export",
]
