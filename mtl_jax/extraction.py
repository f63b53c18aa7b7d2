"""From a run of many tasks to a run of one, with the experts that it uses."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import configuration, optim, train
from mtl_jax.data.mixture import evaluation_batches, training_batches
from mtl_jax.flops import count_flops
from mtl_jax.layers.moe.execution import Execution
from mtl_jax.models.experts import (
    Extracted,
    expert_layers,
    expert_usage,
    extract,
    kept_experts,
)
from mtl_jax.models.experts.extract import visible_kept
from mtl_jax.models.multitask import MultitaskModel, repeat
from mtl_jax.models.vit import VisionTransformer, layers_of_blocks
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.description import describe
from mtl_jax.train.evaluate import make_evaluate
from mtl_jax.train.loop import CHECKPOINTS
from mtl_jax.train.program import Program
from mtl_jax.train.start_from import train_new
from mtl_jax.train.state import TrainState

USAGE_EXAMPLES = 1024
"""Training records of each source that usage is measured on."""


def extract_run(
    program: Program,
    state: TrainState,
    folder: train.RunFolder,
    task: str,
    output: Path,
    threshold: float = 0.03,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the folder of a run of one task that is extracted from another run.

    Which experts the task uses is measured on training records. The new folder has a
    config and one checkpoint, which ``mtl-jax eval`` evaluates, and
    ``extraction.json``. Where experts have a capacity, those that are kept have more
    slots than before, and predictions differ by tokens that are no longer dropped.

    Args:
      program: Of the run of many tasks.
      state: Its trained state.
      folder: Its folder.
      task: Name of the task.
      output: The new folder.
      threshold: See `mtl_jax.models.experts.kept_experts`.
      trust: See `mtl_jax.configuration.from_document`.

    Returns:
      The content of ``extraction.json``: ``usage`` and ``kept`` by layer; parameters,
      FLOPs of the forward pass of one example, and metrics, ``before`` and ``after``.

    Raises:
      ValueError: If there is no such task, or the trunk has no experts; if the folder
        holds a run already.
    """
    experiment = program.experiment
    _check(experiment, task, output)
    model: Any = experiment.model
    document = folder.read_json("config.json") or {}
    config = configuration.from_document(document, trust)
    usage = _measure(program, state, task)
    kept = kept_experts(model.trunk, usage, threshold)
    small = extract(
        model, state.params, task, kept, experiment.inputs, state.collections
    )
    visible = visible_kept(model.trunk, kept, model.task_index(task))
    new_config = _config_of_task(config, task, kept, visible)
    new_experiment = configuration.build(new_config)
    train.validate(new_experiment)
    new_program = train.build_program(
        dataclasses.replace(new_experiment, initialize=lambda _: small.params)
    )
    new_state = _state_of(new_program, small, state)
    images = experiment.inputs[task]
    report = {
        "task": task,
        "threshold": threshold,
        "usage": {name: used.tolist() for name, used in usage.items()},
        "kept": {name: indices.tolist() for name, indices in kept.items()},
        "before": {
            "parameters": _size(state.params),
            "flops": forward_flops(
                model, state.params, state.collections, task, images
            ),
            "metrics": make_evaluate(_only(program, task))(state.variables, None)[task],
        },
        "after": {
            "parameters": _size(small.params),
            "flops": forward_flops(
                small.model, small.params, small.collections, task, images
            ),
            "metrics": make_evaluate(new_program)(new_state.variables, None)[task],
        },
    }
    new = train.RunFolder(output)
    new.write_json(
        "config.json", configuration.to_document(new_config, document["config"])
    )
    _save(new_program, new_state, new)
    new.write_json("extraction.json", report)
    return report


def format_extraction(report: Mapping[str, Any]) -> str:
    """What became less and what was kept, as a table for the terminal."""
    before, after = report["before"], report["after"]
    rows = [
        ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}"),
        ("FLOPs an example", f"{before['flops']:,}", f"{after['flops']:,}"),
    ]
    for name, value in before["metrics"].items():
        if name != "constant_predictor":
            rows.append((name, f"{value:.4f}", f"{after['metrics'][name]:.4f}"))
    for name, used in report["usage"].items():
        rows.append(
            (f"experts of {name}", str(len(used)), str(len(report["kept"][name])))
        )
    lines = [("", "all tasks", report["task"]), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        f"{label:<{widths[0]}}  {old:>{widths[1]}}  {new:>{widths[2]}}"
        for label, old, new in lines
    )


def forward_flops(
    model: MultitaskModel,
    params: Mapping[str, Any],
    collections: Mapping[str, Any],
    task: str,
    images: jax.ShapeDtypeStruct,
) -> int:
    """FLOPs of the prediction of one task for one example.

    Experts count for the rows that balanced routing sends to them, in whatever way they
    are carried out.

    Args:
      model: Trunk and heads; the trunk is a `VisionTransformer`.
      params: ``{"trunk": ..., "heads": ...}``.
      collections: What the trunk keeps besides its parameters.
      task: Name of the task.
      images: Shape and type of a batch.
    """
    counted = dataclasses.replace(model, trunk=_in_full_buffers(model.trunk))

    def predict(params: Any, collections: Any, inputs: jax.Array) -> jax.Array:
        output = counted.apply_trunk(
            repeat(params["trunk"], 1),
            inputs,
            (task,),
            train=False,
            collections=collections,
        )
        return counted.apply_head(params["heads"][task], output.features[0], task)

    jaxpr = jax.make_jaxpr(predict)(params, collections, images)
    return count_flops(jaxpr) // images.shape[0]


def _in_full_buffers(trunk: Any) -> VisionTransformer:
    """The trunk with as many rows of experts as tokens are sent to them, none empty."""

    def full(make: Any, *arguments: Any) -> Any:
        if make is None or not hasattr(make(*arguments), "execution"):
            return make
        made = make(*arguments)
        router = made.router(num_experts=made.num_experts, num_selected=1)
        # Routers that fill buffers themselves have a capacity of their own.
        if hasattr(router, "capacity_factor"):
            return make
        fields: dict[str, Any] = {"execution": Execution("all_gather", "buffers")}
        for name in ("capacity_factor", "evaluation_capacity_factor"):
            if hasattr(made, name):
                fields[name] = 1.0
        return functools.partial(make, **fields)

    blocks = layers_of_blocks(trunk.moe, trunk.attention, trunk.depth)
    return trunk.clone(
        moe=tuple(full(moe) for moe, _ in blocks),
        attention=tuple(full(attention, trunk.num_heads) for _, attention in blocks),
    )


def _check(experiment: train.Experiment, task: str, output: Path) -> None:
    names = [item.name for item in experiment.tasks]
    if task not in names:
        raise ValueError(f"task is {task!r}; the run has {', '.join(names)}")
    trunk = experiment.trunk
    if not isinstance(trunk, VisionTransformer) or not expert_layers(trunk):
        raise ValueError(
            "the trunk of the run has no experts to choose from; extract takes a "
            "VisionTransformer with experts"
        )
    if (output / "config.json").exists():
        raise ValueError(f"{output} holds a run already; choose another --output")


def _measure(program: Program, state: TrainState, task: str) -> dict[str, np.ndarray]:
    """Which experts the task uses on the training records of its sources."""
    experiment = program.experiment

    def batches():
        for source, tasks in experiment.labels.items():
            if task not in tasks:
                continue
            component = experiment.mixture.components[source]
            # Labels are not looked at, and records not changed.
            unlabelled = dataclasses.replace(component, test=component.train, tasks=())
            for examples in evaluation_batches(
                unlabelled, {}, experiment.evaluation_batch_size, USAGE_EXAMPLES
            ):
                yield jnp.asarray(examples.inputs)

    with program.scope():
        return expert_usage(
            experiment.model, state.params, task, batches(), state.collections
        )


def _only(program: Program, task: str) -> Program:
    """The program with the data of one task alone, for its evaluation."""
    experiment, objective = program.experiment, program.objective
    components = {
        source: dataclasses.replace(component, tasks=(task,))
        for source, component in experiment.mixture.components.items()
        if task in component.tasks
    }
    mixture = dataclasses.replace(experiment.mixture, components=components)
    return dataclasses.replace(
        program,
        experiment=dataclasses.replace(experiment, mixture=mixture),
        objective=dataclasses.replace(
            objective,
            tasks=tuple(item for item in objective.tasks if item.name == task),
            labels={
                source: (task,)
                for source, tasks in objective.labels.items()
                if task in tasks
            },
        ),
    )


def _config_of_task(
    config: fdl.Config,
    task: str,
    kept: Mapping[str, np.ndarray],
    visible: Mapping[str, tuple[int, ...]],
) -> fdl.Config:
    """The config of the extracted model, on one kind of devices."""
    config = copy.deepcopy(config)
    trunk = config.trunk

    def fewer(make: Any, layer: str) -> Any:
        if layer not in kept:
            return make
        make = fdl.copy_with(_partial(make), num_experts=len(kept[layer]))
        if layer in visible:
            router = _partial(make.router)
            gate = fdl.copy_with(_partial(router.gate), visible_experts=visible[layer])
            make.router = fdl.copy_with(router, gate=gate)
        return make

    blocks = layers_of_blocks(trunk.moe, trunk.attention, trunk.depth)
    trunk.moe = tuple(fewer(moe, f"block_{i}") for i, (moe, _) in enumerate(blocks))
    if any(name.endswith("_attention") for name in kept):
        trunk.attention = tuple(
            fewer(attention, f"block_{i}_attention")
            for i, (_, attention) in enumerate(blocks)
        )
    if trunk.num_tasks is not None:
        trunk.num_tasks = 1
    trunk.scan = False
    config.tasks = tuple(item for item in config.tasks if item.name == task)
    components = config.mixture.components
    config.mixture.components = {
        name: fdl.copy_with(component, tasks=(task,))
        for name, component in components.items()
        if task in component.tasks
    }
    # What there is to aggregate, to start from and to split has gone.
    config.aggregator = fdl.Partial(optim.sum)
    config.gradients_at = "params"
    config.initialize = None
    config.mutual_information_weight = 0.0
    config.mesh = fdl.Config(train.MeshShape)
    while fdl.get_callable(config.optimizer) is train_new:
        config.optimizer = config.optimizer.optimizer
    return config


def _partial(make: Any) -> fdl.Partial:
    return make if isinstance(make, fdl.Partial) else fdl.Partial(make)


def _state_of(program: Program, small: Extracted, old: TrainState) -> TrainState:
    """The state of the new run, at the step at which the old one was."""
    collections = jax.device_put(small.collections, program.replicated)
    # A batch of one is initialised on, which a mesh of several devices cannot split.
    state = program.init_state()
    return dataclasses.replace(state, step=old.step, collections=collections)


def _save(program: Program, state: TrainState, folder: train.RunFolder) -> None:
    experiment = program.experiment
    batches = training_batches(
        experiment.mixture,
        {task.name: task.field for task in experiment.tasks},
        experiment.seed,
        program.share_multiple,
        rows=program.local_rows,
    )
    description = describe(program, folder.read_json("config.json"))
    checkpoints = Checkpoints(folder.path / CHECKPOINTS, description)
    try:
        checkpoints.save(int(state.step), state, batches)
    finally:
        checkpoints.close()


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
