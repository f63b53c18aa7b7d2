"""Examples of what a trained model predicts, for the report."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from mtl_jax.data.mixture import Component, evaluation_batches
from mtl_jax.models.inference import first_choices
from mtl_jax.train.evaluate import make_predict
from mtl_jax.train.program import Program
from mtl_jax.train.run_folder import open_without_links

NUM_TILES = 6
NUM_MISTAKES = 24


def collect_samples(program: Program, params: Mapping) -> dict[str, np.ndarray]:
    """Picks test inputs with their targets and predictions.

    Of a source with dense targets, examples spread evenly over the test records; of
    one with labels for whole images, the first that any task gets wrong. All processes
    take part, and get the same.

    Args:
      program: The trained program.
      params: The trained parameters.

    Returns:
      ``source/image``, ``source/task/target`` and ``source/task/prediction``, classes
      as integers; of dense targets also ``source/routing/task/layer``, the expert of
      each patch, with ``all`` for the task where routers do not tell tasks apart.
    """
    return {
        f"{source}/{name}": array
        for source in program.objective.labels
        for name, array in _source_samples(program, params, source).items()
    }


def write_samples(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes samples whole or not at all.

    Args:
      path: The ``.npz`` file.
      arrays: From `collect_samples`.
    """
    temporary = path.with_name(f".{path.name}")
    # What a killed process left, or a stranger's link.
    temporary.unlink(missing_ok=True)
    with open_without_links(temporary, "xb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def _source_samples(
    program: Program, params: Mapping, source: str
) -> dict[str, np.ndarray]:
    experiment = program.experiment
    component: Component = experiment.mixture.components[source]
    fields = {task.name: task.field for task in experiment.tasks}
    fields = {task: fields[task] for task in component.tasks}
    predict = make_predict(program.objective, source)
    # Every process gets the rows of all.
    show = jax.jit(
        lambda params, examples: (examples, predict(params, examples.inputs)),
        out_shardings=program.replicated,
    )
    collected: dict[str, list[np.ndarray]] = {}
    with program.scope():
        for local in evaluation_batches(
            component,
            fields,
            experiment.evaluation_batch_size,
            rows=program.local_rows,
        ):
            examples, predictions = jax.device_get(show(params, program.place(local)))
            real = next(iter(examples.mask.values()))
            parts = {"image": examples.inputs}
            for task, prediction in predictions.items():
                target = examples.targets[task]
                if component.test.fields[fields[task]].num_classes is not None:
                    prediction = np.argmax(prediction, axis=-1)
                parts[f"{task}/target"] = target
                parts[f"{task}/prediction"] = prediction
            for name, part in parts.items():
                collected.setdefault(name, []).append(np.asarray(part)[real])
    whole = {name: np.concatenate(parts) for name, parts in collected.items()}
    chosen = _choose(whole, tuple(fields))
    samples = {name: array[chosen] for name, array in whole.items()}
    if any(samples[f"{task}/target"].ndim > 1 for task in fields):
        samples |= _routing(program, params, tuple(fields), samples["image"])
    return samples


def _routing(
    program: Program, params: Mapping, tasks: tuple[str, ...], images: np.ndarray
) -> dict[str, np.ndarray]:
    """The expert that each patch of the images goes to first, by task and layer."""
    model = program.objective.model
    size = program.experiment.evaluation_batch_size
    padded = -(-len(images) // size) * size
    batch = np.zeros((padded, *images.shape[1:]), images.dtype)
    batch[: len(images)] = images
    choose = jax.jit(
        lambda params, images, index: first_choices(
            model, params["trunk"], images, index, params.get("collections")
        ),
        out_shardings=program.replicated,
    )
    routing = {}
    # Without a router a task, one task tells of all.
    for task in tasks if model.task_conditioned else tasks[:1]:
        with program.scope():
            index = np.int32(model.task_index(task))
            placed = program.place(batch[program.local_rows(padded)])
            found = jax.device_get(choose(params, placed, index))
        name = task if model.task_conditioned else "all"
        for layer, experts in found.items():
            routing[f"routing/{name}/{layer}"] = experts[: len(images)].astype(np.int16)
    return routing


def _choose(whole: Mapping[str, np.ndarray], tasks: tuple[str, ...]) -> np.ndarray:
    dense = any(whole[f"{task}/target"].ndim > 1 for task in tasks)
    number = len(whole["image"])
    if dense:
        return np.unique(np.linspace(0, number - 1, NUM_TILES).astype(int))
    wrong = np.any(
        [whole[f"{task}/target"] != whole[f"{task}/prediction"] for task in tasks],
        axis=0,
    )
    return np.flatnonzero(wrong)[:NUM_MISTAKES]
