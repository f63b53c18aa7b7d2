"""What a run's ``result.json`` holds."""

import importlib.metadata
import platform
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax

from mtl_jax.train.experiment import Experiment
from mtl_jax.train.program import Program, count_parameters


def describe_run(
    program: Program,
    config_name: str,
    scores: Mapping[str, Mapping[str, Any]],
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """The result of a run that is at its end.

    Args:
      program: What was run.
      config_name: What the result calls the config.
      scores: Task name -> what `mtl_jax.train.evaluate` found.
      cost: What the run took: ``flops_per_step``, ``compile_seconds``,
        ``examples_per_second``, ``input_stall`` and ``wall_time_seconds``.
    """
    experiment = program.experiment
    parameters, active = count_parameters(program)
    cost = dict(cost)
    wall_time_seconds = cost.pop("wall_time_seconds")
    return {
        "config": config_name,
        "seed": experiment.seed,
        "num_steps": experiment.num_steps,
        "tasks": task_results(experiment, scores),
        "sources": _describe_sources(program),
        "mesh": dict(program.mesh.shape),
        "method": _describe_method(experiment),
        "cost": {
            "parameters": parameters,
            "active_parameters": active,
            "peak_memory_bytes": _peak_memory(),
            **cost,
        },
        "versions": versions(),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "wall_time_seconds": wall_time_seconds,
    }


def task_results(experiment: Experiment, scores: Mapping) -> dict[str, Any]:
    """What a result says of every task.

    Args:
      experiment: The run's experiment.
      scores: Task name -> what `mtl_jax.train.evaluate` found.
    """
    results = {}
    for task in experiment.tasks:
        sources = [s for s, tasks in experiment.labels.items() if task.name in tasks]
        label = experiment.mixture.components[sources[0]].test.fields[task.field]
        values = scores[task.name]
        results[task.name] = {
            "metrics": {
                metric.name: {
                    "value": values[metric.name],
                    "higher_is_better": metric.higher_is_better,
                    "constant_predictor": values["constant_predictor"][metric.name],
                }
                for metric in task.metrics
            },
            "headline": task.metrics[0].name,
            "output": {
                "kind": "values" if label.num_classes is None else "classes",
                "dense": len(label.shape) > 1,
                "num_classes": label.num_classes,
                "class_names": list(label.class_names),
            },
            "sources": sources,
        }
    return results


def _describe_sources(program: Program) -> dict[str, Any]:
    experiment = program.experiment
    shares = experiment.mixture.examples_per_batch(program.share_multiple)
    return {
        name: {
            "train_examples": len(component.train),
            "test_examples": len(component.test),
            "examples_per_step": shares[name],
            "tasks": list(component.tasks),
            "image_shape": list(component.train.fields[component.input_field].shape),
        }
        for name, component in experiment.mixture.components.items()
        if name in shares
    }


def _describe_method(experiment: Experiment) -> dict[str, Any]:
    def name(function) -> str:
        return getattr(function, "func", function).__name__

    sharpness = experiment.sharpness
    return {
        "aggregator": name(experiment.aggregator),
        "gradients_at": experiment.gradients_at,
        "sharpness_rho": None
        if sharpness is None
        else getattr(sharpness, "keywords", {}).get("rho"),
    }


def versions() -> dict[str, str]:
    """Versions of the interpreter and of the packages that results depend on."""
    packages = (
        "mtl_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "source tree"
    return {"python": platform.python_version(), **versions}


def _peak_memory() -> int:
    """Peak bytes on the first device, or of this process where the device is a CPU."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
