"""Checks of a model before anything is compiled: trunk, experts, heads, losses."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models import VisionTransformer
from mtl_jax.models.multitask import repeat
from mtl_jax.tasks.task import Task
from mtl_jax.train.experiment import Experiment

UNROLLED = 256
"""Blocks that may be compiled one by one: large models have at most half of it."""


def check_kind(path: str, value: Any, kind: type) -> None:
    """Raises ValueError unless ``value``, the field at ``path``, is of that kind."""
    if not isinstance(value, kind):
        raise ValueError(
            f"{path} is {value!r}; it must be a {kind.__name__}, or fdl.Config of one"
        )


@contextlib.contextmanager
def calling(what: str, remedy: str = "mend it") -> Iterator[None]:
    """Explains what a config's functions raise where they are tried.

    A ValueError or OSError says itself what is wrong, in words for the user.

    Args:
      what: What is tried, such as "optimizer cannot be called".
      remedy: What to do.

    Raises:
      ValueError: With the reason, for whatever else is raised inside.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever these functions raise for their arguments
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        raise ValueError(f"{what} ({reason}); {remedy}") from error


def check_trunk(experiment: Experiment) -> None:
    """Raises ValueError if a size or type of the trunk, experts or heads is wrong."""
    trunk = experiment.trunk
    names = ("width", "num_heads", "patch_size", "mlp_ratio", "num_channels")
    _check_sizes("trunk", trunk, names)
    _check_sizes("trunk", trunk, ("depth",), most=1000)
    depth = getattr(trunk, "depth", 0)
    if isinstance(depth, int) and depth > UNROLLED and not getattr(trunk, "scan", True):
        raise ValueError(
            f"trunk.depth is {depth}, and without a scan each block is compiled by "
            f"itself; more than {UNROLLED} take too long, so set trunk.scan=True"
        )
    _check_dtype("trunk", trunk)
    for task in experiment.tasks:
        path = f"tasks.{task.name}.head"
        _check_sizes(path, task.head, ("num_classes", "patch_size", "hidden"))
        _check_dtype(path, task.head)
    num_routers = getattr(trunk, "num_tasks", None)
    if num_routers is not None and num_routers != len(experiment.tasks):
        raise ValueError(
            f"trunk.num_tasks is {num_routers}, but there are "
            f"{len(experiment.tasks)} tasks; make them equal, or use None for a "
            "trunk that the tasks share"
        )
    mixtures = {"trunk.moe": getattr(trunk, "moe", None)}
    if isinstance(mixtures["trunk.moe"], tuple):
        mixtures = {
            f"trunk.moe.{i}": make for i, make in enumerate(mixtures["trunk.moe"])
        }
    for path, make in mixtures.items():
        if make is not None:
            _check_experts(path, make)
        keywords = getattr(make, "keywords", {})
        for name in ("num_tasks", "dtype"):
            if name in keywords and isinstance(trunk, VisionTransformer):
                raise ValueError(
                    f"{path}.{name} is {keywords[name]!r}, but the trunk gives its "
                    f"own to the experts; set trunk.{name} instead"
                )
    if experiment.evaluation_batch_size % experiment.group_size:
        raise ValueError(
            f"evaluation_batch_size is {experiment.evaluation_batch_size}; it must be "
            f"a multiple of the routing group of {experiment.group_size} examples"
        )


def _check_experts(path: str, make: Any) -> None:
    if isinstance(make, nn.Module) or not callable(make):
        raise ValueError(
            f"{path} is a {type(make).__name__}; it must make one: use fdl.Partial "
            "rather than fdl.Config"
        )
    with calling(
        f"{path} cannot be called",
        "use fdl.Partial of a class of experts, with all that it needs",
    ):
        moe: Any = make()
    check_kind(f"{path}()", moe, nn.Module)
    _check_sizes(path, moe, ("num_experts", "expert_hidden", "group_size"))
    _check_sizes(path, moe, ("num_selected",), most=moe.num_experts)
    router = getattr(moe, "router", None)
    if router is None:
        return
    if isinstance(router, nn.Module) or not callable(router):
        raise ValueError(
            f"{path}.router is a {type(router).__name__}; it must make one: use "
            "fdl.Partial rather than fdl.Config"
        )
    with calling(
        f"{path}.router cannot be called with num_experts and num_selected",
        "use fdl.Partial of a class of routers",
    ):
        made: Any = router(num_experts=moe.num_experts, num_selected=moe.num_selected)
    check_kind(f"{path}.router()", made, nn.Module)
    for name, value in vars(made).items():
        if name.endswith(("_std", "_weight")) and value < 0:
            raise ValueError(f"{path}.router.{name} is {value}; it must be at least 0")


def _check_sizes(
    path: str, module: nn.Module, names: Iterable[str], most: int = 2**20
) -> None:
    """Checks those of the named fields that the module has; it may be the user's."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int | float) and not 1 <= value <= most:
            raise ValueError(
                f"{path}.{name} is {value}; it must be at least 1 and at most {most:,}"
            )


def _check_dtype(path: str, module: nn.Module) -> None:
    dtype = getattr(module, "dtype", jnp.float32)
    try:
        known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ValueError(
            f"{path}.dtype is {dtype!r}; use a floating-point type, such as float32 "
            "or bfloat16"
        )


def check_heads(experiment: Experiment, runs_here: bool) -> None:
    """Compares the shape of every prediction with the labels it is to be judged by."""
    model, key = experiment.model, jax.random.key(0)
    inputs = experiment.inputs

    def init(key: jax.Array) -> tuple:
        return model.init(key, inputs), model.init_collections(key, inputs)

    with calling("the trunk or a head cannot be built", "check its sizes and parts"):
        params, collections = nn.unbox(jax.eval_shape(init, key))
    leaves = jax.tree.leaves(params)
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    if runs_here and needed > _device_memory():
        raise ValueError(
            f"the model has {sum(leaf.size for leaf in leaves):,} parameters, which "
            f"take {needed / 1e9:,.0f} GB, but the devices have "
            f"{_device_memory() / 1e9:,.0f} GB; make the trunk or a head smaller"
        )
    for task in experiment.tasks:
        for source, tasks in experiment.labels.items():
            if task.name not in tasks:
                continue
            component = experiment.mixture.components[source]
            image = component.train.fields[component.input_field]
            label = component.train.fields[task.field]
            batch = experiment.group_size
            images = jax.ShapeDtypeStruct((batch, *image.shape), jnp.dtype(image.dtype))

            def predict(
                params: Any, collections: Any, images: Any, name: str = task.name
            ) -> jax.Array:
                output = model.apply_trunk(
                    repeat(params["trunk"], 1),
                    images,
                    (name,),
                    train=False,
                    collections=collections,
                )
                return model.apply_head(params["heads"][name], output.features[0], name)

            with calling(
                f"the trunk or the head of task {task.name!r} cannot be applied to the "
                f"images of source {source!r}",
                "check its sizes and parts",
            ):
                prediction = jax.eval_shape(predict, params, collections, images)
            if not hasattr(prediction, "shape"):
                raise ValueError(
                    f"the head of task {task.name!r} predicts {prediction!r}; it must "
                    "predict an array"
                )
            expected = label.shape
            if label.num_classes is not None:
                expected = (*expected, label.num_classes)
            if prediction.shape[1:] != expected:
                raise ValueError(
                    f"the head of task {task.name!r} predicts shape "
                    f"{prediction.shape[1:]} for each example, but the labels of "
                    f"source {source!r} need {expected}; change the head's "
                    "num_classes or patch_size"
                )
            _check_loss(
                task,
                prediction,
                jax.ShapeDtypeStruct((batch, *label.shape), jnp.dtype(label.dtype)),
            )


def _check_loss(
    task: Task, prediction: jax.ShapeDtypeStruct, target: jax.ShapeDtypeStruct
) -> None:
    mask = jax.ShapeDtypeStruct(target.shape[:1], jnp.bool_)
    name = "loss"
    try:
        terms = jax.eval_shape(task.loss, prediction, target)
        for metric in task.metrics:
            name = f"metric {metric.name!r}"
            jax.eval_shape(metric.update, prediction, target, mask)
    except Exception as error:  # it may be anybody's function
        raise ValueError(
            f"the {name} of task {task.name!r} does not take predictions "
            f"{prediction.dtype} {prediction.shape} and targets {target.dtype} "
            f"{target.shape} ({error}); choose another one or change the head"
        ) from error
    shapes = jax.tree.map(lambda leaf: leaf.shape, terms)
    if shapes != (target.shape, target.shape):
        raise ValueError(
            f"the loss of task {task.name!r} returns shapes {shapes} for targets of "
            f"shape {target.shape}; it must return the loss of each element and which "
            "are labelled"
        )


def _device_memory() -> int:
    """Bytes of all devices of this host together; CPU devices share its memory."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    return sum(s.get("bytes_limit", 0) for s in statistics) or host_memory()


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
