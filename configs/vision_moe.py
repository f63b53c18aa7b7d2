"""Vision transformers with experts, from 6 million to 100 billion parameters.

Four dense tasks on images of 224 x 224 pixels in patches of 16: surface, climate,
elevation and slope of the Earth's tiles that ship with the package. These have 32 x 32
pixels and are enlarged, which adds no detail: they stand in for a data set of your own,
of which a pod needs far more. To use it, change ``mixture.components`` and ``tasks``;
everything else can stay.

Every second block has experts, of which each token goes to two. The tasks share the
router, so that one pass serves all of them; UPGrad combines their gradients at the
features, which costs no more than a plain sum. Computed in bfloat16, with float32
parameters; blocks are looped over, and recomputed in the backward pass. Each variant
has the mesh and the batch for one slice:

| variant | width | depth | experts | parameters | slice | mesh |
|---|---|---|---|---|---|---|
| `tiny_6m` | 192 | 6 | 4 | 6 M | v5e:2x4 | expert 4 |
| `small_72m` | 384 | 12 | 8 | 72 M | v5e:4x4 | expert 8 |
| `base_1b` | 768 | 12 | 32 | 0.97 B | v5e:8x8 | expert 8 |
| `large_3b` | 1024 | 24 | 32 | 3.4 B | v5e:16x16 | expert 16, fsdp 4 |
| `giant_21b` | 1408 | 40 | 64 | 21 B | v5p:8x8x8 | expert 8, fsdp 8 |
| `huge_100b` | 2048 | 46 | 128 | 100 B | v5p:8x8x16 | expert 16, fsdp 8 |

    mtl-jax compile vision_moe:base_1b --topology v5e:8x8
    mtl-jax train vision_moe:tiny_6m --smoke

None of them has been trained for long: there was no pod. What a step would cost on
these slices is in docs/scaling.md.
"""

import functools

import fiddle as fdl

from mtl_jax import optim
from mtl_jax.data import Component, Mixture, dihedral
from mtl_jax.data.sources.earth import Earth
from mtl_jax.data.sources.enlarged import Enlarged
from mtl_jax.layers.heads import DensePrediction
from mtl_jax.layers.moe import MoE
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
from mtl_jax.train import Experiment, MeshShape, adamw

PATCH_SIZE = 16
ENLARGED = 7  # 32 pixels to 224
NUM_SELECTED = 2


def _task(name: str, num_classes: int | None) -> fdl.Config:
    metrics = (accuracy, mean_iou) if num_classes else (r2, mean_absolute_error)
    return fdl.Config(
        Task,
        name=name,
        head=fdl.Config(
            DensePrediction, patch_size=PATCH_SIZE, num_classes=num_classes
        ),
        loss=softmax_cross_entropy if num_classes else huber,
        metrics=tuple(fdl.Config(metric) for metric in metrics),
    )


def _tiles(split: str) -> fdl.Config:
    return fdl.Config(Enlarged, source=fdl.Config(Earth, split=split), factor=ENLARGED)


def vision_moe(
    *,
    width: int,
    depth: int,
    num_experts: int,
    chips: int,
    examples_per_chip: int,
    expert: int,
    fsdp: int = 1,
    group_size: int = 4,
) -> fdl.Config:
    """A model and the mesh for a slice of ``chips`` chips."""
    tasks = (
        _task("surface", 2),
        _task("climate", 5),
        _task("elevation", None),
        _task("log_slope", None),
    )
    return fdl.Config(
        Experiment,
        tasks=tasks,
        mixture=fdl.Config(
            Mixture,
            components={
                "earth": fdl.Config(
                    Component,
                    train=_tiles("train"),
                    test=_tiles("test"),
                    tasks=tuple(task.name for task in tasks),
                    augment=dihedral,
                )
            },
            batch_size=chips * examples_per_chip,
        ),
        trunk=fdl.Config(
            VisionTransformer,
            width=width,
            depth=depth,
            num_heads=width // 64,
            patch_size=PATCH_SIZE,
            moe=fdl.Partial(
                MoE,
                num_experts=num_experts,
                num_selected=NUM_SELECTED,
                expert_hidden=4 * width,
                group_size=group_size,
                capacity_factor=1.25,
            ),
            remat=True,
            scan=True,
            dtype="bfloat16",
        ),
        aggregator=fdl.Partial(optim.upgrad),
        gradients_at="features",
        optimizer=fdl.Partial(adamw, learning_rate=1e-3, b2=0.95),
        num_steps=100_000,
        mesh=fdl.Config(MeshShape, data=-1, fsdp=fsdp, expert=expert),
        rules=fdl.Config(Rules),
        evaluate_every=5_000,
        checkpoint_every=1_000,
        log_every=50,
        evaluation_batch_size=chips * group_size,
    )


VARIANTS = {
    "tiny_6m": functools.partial(
        vision_moe,
        **{"width": 192, "depth": 6, "num_experts": 4},
        **{"chips": 8, "examples_per_chip": 128, "expert": 4},
    ),
    "small_72m": functools.partial(
        vision_moe,
        **{"width": 384, "depth": 12, "num_experts": 8},
        **{"chips": 16, "examples_per_chip": 128, "expert": 8},
    ),
    "base_1b": functools.partial(
        vision_moe,
        **{"width": 768, "depth": 12, "num_experts": 32},
        **{"chips": 64, "examples_per_chip": 64, "expert": 8},
    ),
    "large_3b": functools.partial(
        vision_moe,
        **{"width": 1024, "depth": 24, "num_experts": 32},
        **{"chips": 256, "examples_per_chip": 32, "expert": 16, "fsdp": 4},
    ),
    "giant_21b": functools.partial(
        vision_moe,
        **{"width": 1408, "depth": 40, "num_experts": 64},
        **{"chips": 512, "examples_per_chip": 64, "expert": 8, "fsdp": 8},
    ),
    "huge_100b": functools.partial(
        vision_moe,
        **{"width": 2048, "depth": 46, "num_experts": 128},
        **{"chips": 1024, "examples_per_chip": 64, "expert": 16, "fsdp": 8},
    ),
}


def smoke(config: fdl.Config) -> None:
    """Shrinks a config of this file to a few small steps."""
    config.num_steps = 4
    config.evaluate_every = config.checkpoint_every = 2
    config.log_every = 1
    config.mesh = fdl.Config(MeshShape, data=-1)
    config.mixture.batch_size = 32
    config.evaluation_batch_size = 32
    config.evaluation_examples = 32
    for split in ("train", "test"):
        getattr(config.mixture.components["earth"], split).factor = 1
    config.trunk.width = 32
    config.trunk.depth = 2
    config.trunk.num_heads = 2
    config.trunk.moe.num_experts = 4
    config.trunk.moe.expert_hidden = 64
