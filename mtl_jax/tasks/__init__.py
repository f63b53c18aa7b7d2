"""Tasks: what to predict, how it is penalised, how it is judged."""

from mtl_jax.tasks.losses import huber, labelled, softmax_cross_entropy, squared_error
from mtl_jax.tasks.metrics import (
    Metric,
    accuracy,
    mean_absolute_error,
    mean_iou,
    r2,
)
from mtl_jax.tasks.task import Task

__all__ = [
    "Metric",
    "Task",
    "accuracy",
    "huber",
    "labelled",
    "mean_absolute_error",
    "mean_iou",
    "r2",
    "softmax_cross_entropy",
    "squared_error",
]
