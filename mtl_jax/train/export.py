"""A trained model's prediction of one task as a program that needs only JAX to run."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.errors import ConcretizationTypeError, InconclusiveDimensionOperation

from mtl_jax.models.inference import (
    as_placed_experts,
    group_size,
    predict,
    single_examples,
)
from mtl_jax.train.program import Program
from mtl_jax.train.run_folder import open_without_links
from mtl_jax.train.state import TrainState

PLATFORMS = ("cpu", "cuda", "tpu")
"""What programs are exported for: one that runs on all of them."""

LARGEST_PROGRAM = 2**31
"""Bytes that a serialized program can have."""


def export_task(
    program: Program,
    state: TrainState,
    task: str,
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> tuple[bytes, dict[str, Any]]:
    """Serializes the function from images to the prediction of one task.

    The parameters that the task needs are in it: the trunk's, with all experts, and its
    head's. Experts compute blocks of rows in a loop, which is right on every platform.

    Args:
      program: The run's program, on one device.
      state: The trained state.
      task: Name of the task.
      batch: Images that the function takes; None for any number, or any multiple of
        the routing group of experts that have a capacity.
      platforms: JAX's names of the platforms that it is to run on.

    Returns:
      The serialized program, which ``jax.export.deserialize`` reads, and what its input
      and output are.

    Raises:
      ValueError: If there is no such task, the batch does not fit, a layer needs a
        fixed batch, or the parameters are too large for a serialized program.
    """
    experiment = program.experiment
    names = [item.name for item in experiment.tasks]
    if task not in names:
        raise ValueError(f"task is {task!r}; the run has {', '.join(names)}")
    model = single_examples(experiment.model)
    multiple = group_size(model)
    if batch is not None and (batch < 1 or batch % multiple):
        raise ValueError(
            f"batch is {batch}; it must be a positive multiple of the routing group of "
            f"{multiple}"
        )
    params = {
        "trunk": as_placed_experts(state.params["trunk"]),
        "heads": {task: state.params["heads"][task]},
    }
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if size > 0.98 * LARGEST_PROGRAM:
        raise ValueError(
            f"the parameters take {size / 1e9:.1f} GB, and a serialized program holds "
            "at most 2.1 GB; load the checkpoint where the model is to run"
        )
    source, component = _source(program, task)
    field = component.test.fields[component.input_field]

    def function(images: jax.Array) -> jax.Array:
        return predict(model, params, images, task, state.collections)

    leading = batch
    if batch is None:
        name = "batch" if multiple == 1 else f"{multiple}*groups"
        leading = jax.export.symbolic_shape(name)[0]
    shape = jax.ShapeDtypeStruct((leading, *field.shape), jnp.dtype(field.dtype))
    try:
        exported = jax.export.export(jax.jit(function), platforms=platforms)(shape)
    except (InconclusiveDimensionOperation, ConcretizationTypeError) as error:
        # A layer compared the symbol for the number of images, or wanted its value.
        if batch is not None:
            raise
        raise ValueError(
            "a layer of the trunk or the head needs to know the number of images; "
            "give batch"
        ) from error
    label = component.test.fields[experiment.tasks[names.index(task)].field]
    (output,) = exported.out_avals
    description = {
        "task": task,
        "step": int(state.step),
        "input": {
            "shape": [batch or str(leading), *field.shape],
            "dtype": field.dtype,
            "axes": ["image", "row", "column", "channel"],
            "as_in_source": source,
        },
        "output": {
            "shape": [batch or str(leading), *output.shape[1:]],
            "dtype": str(output.dtype),
            "kind": "values" if label.num_classes is None else "logits of classes",
            "class_names": list(label.class_names),
        },
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    return bytes(exported.serialize()), description


def _source(program: Program, task: str) -> tuple[str, Any]:
    """The first source that labels a task."""
    experiment = program.experiment
    name = next(name for name, tasks in experiment.labels.items() if task in tasks)
    return name, experiment.mixture.components[name]


def write_export(path: Path, data: bytes, description: Mapping[str, Any]) -> Path:
    """Writes a program, and beside it, ending in ``.json``, what it takes and gives.

    Args:
      path: The file of the program; folders above are made.
      data: The serialized program.
      description: Of `export_task`.

    Returns:
      The path of the description.

    Raises:
      ValueError: If ``path`` itself ends in ``.json``.
      OSError: If a file cannot be written.
    """
    beside = path.with_suffix(".json")
    if beside == path:
        raise ValueError(
            f"the output is {path}, but that is where its description goes; choose "
            "another ending"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(description), indent=1) + "\n"
    for target, content in ((path, data), (beside, text.encode())):
        temporary = target.with_name(f".{target.name}.tmp")
        # What a killed process left, or a stranger's link.
        temporary.unlink(missing_ok=True)
        with open_without_links(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, target)
    return beside
