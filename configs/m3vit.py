"""M³ViT: experts that tasks choose by routers of their own (Fan et al., NeurIPS 2022).

Every second block has 16 experts instead of its MLP, each a quarter as wide, and a
token of a task goes to 4 of them, so that it costs what the MLP would. Each task has
its own router over the same experts (multi-gate, the published model), and a forward
and backward pass of its own; the weights of the selected experts are not renormalised.
Heads are the published ones, which double the grid between convolutions.

    mtl-jax train m3vit --workdir runs/m3vit

`main` is small enough for two CPU cores: four tasks on the Earth's tiles that ship with
the package, from random weights. In 18 minutes on two cores that were busy with other
things, seed 0: surface accuracy 0.980, climate accuracy 0.619, elevation R² 0.769,
slope R² 0.182.

`tiny`, `small` and `base` are the published sizes, on images of 512 x 512 pixels as for
PASCAL-Context: the same tiles, enlarged, which adds no detail and stands in for a data
set of your own. Change ``mixture.components`` and ``tasks``; everything else can stay.

    mtl-jax compile m3vit:small --topology v5e:2x2 --set mesh.data=1

| | width | depth | heads | experts | selected | hidden units of an expert |
|---|---|---|---|---|---|---|
| `main` | 96 | 4 | 3 | 16 | 4 | 96 |
| `tiny` | 192 | 12 | 3 | 16 | 4 | 192 |
| `small` | 384 | 12 | 12 | 16 | 4 | 384 |
| `base` | 768 | 12 | 12 | 16 | 4 | 768 |

The published training: SGD with momentum 0.9, learning rate 0.002 with polynomial decay
(power 0.9), weight decay 1e-4, 8 images a step, 100 epochs, balancing 0.01, a trunk
pretrained on ImageNet (docs/pretrained.md tells how to start from one).

- PASCAL-Context: 4,998 training images of 512 x 512 pixels; weights of the losses 1
  (segmentation, 21 classes), 2 (human parts, 7), 5 (saliency), 50 (edges) and 10
  (normals).
- NYUD-v2: 795 training images of 480 x 640 pixels, which is
  ``trunk.position_grid=(30,40)``; weights 1 (segmentation, 40 classes) and 1 (depth).
"""

import fiddle as fdl

from mtl_jax import optim
from mtl_jax.data import Component, Mixture, dihedral
from mtl_jax.data.sources.earth import Earth
from mtl_jax.data.sources.enlarged import Enlarged
from mtl_jax.layers.heads import UpsamplingHead
from mtl_jax.layers.mlp import Mlp, exact_gelu
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import TaskConditionedGate
from mtl_jax.layers.moe.routers import M3ViT
from mtl_jax.layers.moe.routers.m3vit import released_init
from mtl_jax.models import VisionTransformer
from mtl_jax.sharding import Rules
from mtl_jax.tasks import (
    Task,
    accuracy,
    huber,
    mean_absolute_error,
    mean_iou,
    r2,
    softmax_cross_entropy,
)
from mtl_jax.train import Experiment, MeshShape, sgd

BATCH = 8
TASKS = {"surface": 2, "climate": 5, "elevation": None, "log_slope": None}
"""Task -> number of classes, None for values."""


def _task(name: str, patch_size: int, channels: int) -> fdl.Config:
    num_classes = TASKS[name]
    metrics = (accuracy, mean_iou) if num_classes else (r2, mean_absolute_error)
    return fdl.Config(
        Task,
        name=name,
        head=fdl.Config(
            UpsamplingHead,
            patch_size=patch_size,
            num_classes=num_classes,
            channels=channels,
        ),
        loss=softmax_cross_entropy if num_classes else huber,
        metrics=tuple(fdl.Config(metric) for metric in metrics),
    )


def _trunk(
    width: int, depth: int, num_heads: int, patch_size: int, grid: int
) -> fdl.Config:
    perceptron = fdl.Partial(Mlp, activation=exact_gelu)
    return fdl.Config(
        VisionTransformer,
        width=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        moe=fdl.Partial(
            MoE,
            num_experts=16,
            num_selected=4,
            expert_hidden=width,
            capacity_factor=None,
            # The balancing is over the images of a step on one device.
            group_size=BATCH,
            expert=perceptron,
            router=fdl.Partial(M3ViT, balance_weight=0.01),
        ),
        num_tasks=len(TASKS),
        mlp=perceptron,
        class_token="inside",
        position_grid=(grid, grid),
        # Each head begins with a norm of its own.
        final_norm=False,
    )


def main() -> fdl.Config:
    """The multi-gate model, small enough for a CPU."""
    return fdl.Config(
        Experiment,
        tasks=tuple(_task(name, patch_size=4, channels=32) for name in TASKS),
        mixture=fdl.Config(
            Mixture,
            components={
                "earth": fdl.Config(
                    Component,
                    train=fdl.Config(Earth, split="train"),
                    test=fdl.Config(Earth, split="test"),
                    tasks=tuple(TASKS),
                    augment=dihedral,
                )
            },
            batch_size=BATCH,
        ),
        trunk=_trunk(width=96, depth=4, num_heads=3, patch_size=4, grid=8),
        aggregator=fdl.Partial(optim.sum),
        # Ten times as large as published, as nothing is pretrained.
        optimizer=fdl.Partial(sgd, learning_rate=0.02),
        num_steps=1200,
        mesh=fdl.Config(MeshShape),
        rules=fdl.Config(Rules),
        evaluate_every=300,
        checkpoint_every=300,
        log_every=10,
        evaluation_batch_size=64,
        evaluation_examples=128,
    )


def task_conditioned() -> fdl.Config:
    """One router for all tasks, which sees the token and an embedding of the task."""
    config = main()
    config.trunk.moe.router.gate = fdl.Partial(
        TaskConditionedGate, as_released=True, kernel_init=released_init
    )
    return config


def single_gate() -> fdl.Config:
    """One router that knows no task: one pass serves all tasks."""
    config = main()
    config.trunk.num_tasks = None
    return config


def dense() -> fdl.Config:
    """No experts: the plain multitask vision transformer."""
    config = single_gate()
    config.trunk.moe = None
    return config


def _published(width: int, num_heads: int) -> fdl.Config:
    """A published size on 512 x 512 pixels, trained as published."""
    config = main()
    config.trunk = _trunk(width, depth=12, num_heads=num_heads, patch_size=16, grid=32)
    config.tasks = tuple(_task(name, patch_size=16, channels=256) for name in TASKS)
    component = config.mixture.components["earth"]
    for split in ("train", "test"):
        tiles = fdl.Config(Enlarged, source=getattr(component, split), factor=16)
        setattr(component, split, tiles)
    config.optimizer.learning_rate = 0.002
    # 100 epochs of PASCAL-Context's 4,998 images.
    config.num_steps = 62_500
    config.evaluate_every = config.checkpoint_every = 5_000
    config.evaluation_batch_size = BATCH
    return config


def tiny() -> fdl.Config:
    """The size of DeiT-Ti."""
    return _published(width=192, num_heads=3)


def small() -> fdl.Config:
    """The size of DeiT-S, with which most of the published results are."""
    return _published(width=384, num_heads=12)


def base() -> fdl.Config:
    """The size of DeiT-B."""
    return _published(width=768, num_heads=12)


VARIANTS = {
    "main": main,
    "task_conditioned": task_conditioned,
    "single_gate": single_gate,
    "dense": dense,
    "tiny": tiny,
    "small": small,
    "base": base,
}


def smoke(config: fdl.Config) -> None:
    """Shrinks a config of this file to a few small steps."""
    config.num_steps = 4
    config.evaluate_every = config.checkpoint_every = 2
    config.log_every = 1
    config.evaluation_batch_size = BATCH
    config.evaluation_examples = BATCH
    config.trunk.width = 24
    config.trunk.depth = 2
    config.trunk.num_heads = 3
    if config.trunk.moe is not None:
        config.trunk.moe.expert_hidden = 24
    for task in config.tasks:
        task.head.channels = 8
    # The published sizes keep their patches, on fewer of them.
    for split in ("train", "test"):
        source = getattr(config.mixture.components["earth"], split)
        if fdl.get_callable(source) is Enlarged:
            source.factor = 2
