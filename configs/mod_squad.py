"""Mod-Squad: heads and perceptrons that are experts (Chen et al., CVPR 2023).

Blocks take turns: in one the heads of attention are experts, in the next the
perceptrons. Each task has routers of its own over the same experts and a vector that
is added to its tokens before every block, and a loss over all tasks of a step lets each
task keep to few experts while all experts are in use.

    mtl-jax train mod_squad --workdir runs/mod_squad
    mtl-jax extract runs/mod_squad --task digit --output runs/digit

`main` is small enough for two CPU cores: seven tasks on the three data sets that ship
with the package, all of them in every step.

`small` and `base` are the published sizes, for images of 224 x 224 pixels: the Earth's
tiles enlarged, which adds no detail and stands in for a data set of your own. Change
``mixture.components`` and ``tasks``; everything else can stay.

| | width | heads of experts | hidden units of experts | millions of parameters |
|---|---|---|---|---|
| `small` | 384 | 6 of 15 | 96, 4 of 16 | 34.2 |
| `base` | 768 | 12 of 15 | 768, 4 of 16 | 195.8 |

The parameters are those that the released code states, for the 13 tasks of Taskonomy
and its heads. The fields beside them in that code have since changed: 384 hidden units
in the small one (55.4 million), 24 attention experts in the base one (207.0 million).

The published training: AdamW, learning rate 4e-4 for a batch of 256, weight decay 0.05,
100 epochs of which 10 of warm-up, weights of the tasks learned (`awl`), mutual
information weighted by 0.005, drop path 0.1, which this package has not.
"""

import functools

import fiddle as fdl

from mtl_jax import optim
from mtl_jax.data import Component, Mixture, dihedral
from mtl_jax.data.sources.digits import Digits
from mtl_jax.data.sources.earth import Earth
from mtl_jax.data.sources.enlarged import Enlarged
from mtl_jax.data.sources.multi_digits import MultiDigits
from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.heads import Classification, DensePrediction
from mtl_jax.layers.mlp import Mlp, exact_gelu
from mtl_jax.layers.moe import MoE, MoeAttention
from mtl_jax.layers.moe.routers import ModSquad
from mtl_jax.layers.patch import ConvolutionalStem
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

TASKS = {
    "earth": ("surface", "climate", "elevation", "log_slope"),
    "digits": ("digit",),
    "multi_digits": ("left", "right"),
}
NUM_CLASSES = {"surface": 2, "climate": 5}


def _task(name: str, patch_size: int) -> fdl.Config:
    if name not in TASKS["earth"]:
        return fdl.Config(
            Task,
            name=name,
            head=fdl.Config(Classification, num_classes=10),
            loss=softmax_cross_entropy,
            metrics=(fdl.Config(accuracy),),
        )
    classes = NUM_CLASSES.get(name)
    metrics = (accuracy, mean_iou) if classes else (r2, mean_absolute_error)
    return fdl.Config(
        Task,
        name=name,
        head=fdl.Config(DensePrediction, patch_size=patch_size, num_classes=classes),
        loss=softmax_cross_entropy if classes else huber,
        metrics=tuple(fdl.Config(metric) for metric in metrics),
    )


def _trunk(
    width: int,
    *,
    num_heads: int,
    head_width: int,
    attention_experts: int,
    experts: int,
    num_selected: int,
    expert_hidden: int,
    **fields,
) -> fdl.Config:
    """Blocks by turns with experts in attention and behind it."""
    return fdl.Config(
        VisionTransformer,
        width=width,
        num_heads=num_heads,
        attention=(
            fdl.Partial(
                MoeAttention,
                num_experts=attention_experts,
                head_width=head_width,
                router=ModSquad,
            ),
            fdl.Partial(SelfAttention, head_width=head_width),
        ),
        moe=fdl.Partial(
            MoE,
            num_experts=experts,
            num_selected=num_selected,
            expert_hidden=expert_hidden,
            group_size=1,
            capacity_factor=None,
            router=ModSquad,
        ),
        task_embedding=True,
        **fields,
    )


def main() -> fdl.Config:
    """The small job: experts of three data sets at once."""
    names = [name for tasks in TASKS.values() for name in tasks]
    sources = {"earth": Earth, "digits": Digits, "multi_digits": MultiDigits}
    weights = {"earth": 1.0, "digits": 5.0, "multi_digits": 2.0}
    return fdl.Config(
        Experiment,
        tasks=tuple(_task(name, 4) for name in names),
        mixture=fdl.Config(
            Mixture,
            components={
                name: fdl.Config(
                    Component,
                    train=fdl.Config(source, split="train"),
                    test=fdl.Config(source, split="test"),
                    tasks=TASKS[name],
                    weight=weights[name],
                    augment=dihedral if source is Earth else None,
                )
                for name, source in sources.items()
            },
            batch_size=64,
        ),
        trunk=_trunk(
            96,
            num_heads=3,
            head_width=64,
            attention_experts=8,
            experts=8,
            num_selected=2,
            expert_hidden=192,
            depth=4,
            patch_size=4,
            num_tasks=len(names),
            embedding=ConvolutionalStem,
        ),
        aggregator=fdl.Partial(optim.awl),
        mutual_information_weight=0.005,
        optimizer=fdl.Partial(adamw, learning_rate=2e-3, b2=0.98),
        num_steps=850,
        mesh=fdl.Config(MeshShape, data=-1, expert=4),
        rules=fdl.Config(Rules),
        evaluate_every=170,
        checkpoint_every=100,
        log_every=5,
        evaluation_batch_size=64,
        evaluation_examples=256,
    )


def published(width: int, *, num_heads: int, expert_hidden: int) -> fdl.Config:
    """A published size, on enlarged tiles of the Earth."""
    tasks = TASKS["earth"]

    def tiles(split: str) -> fdl.Config:
        return fdl.Config(Enlarged, source=fdl.Config(Earth, split=split), factor=7)

    return fdl.Config(
        Experiment,
        tasks=tuple(_task(name, 16) for name in tasks),
        mixture=fdl.Config(
            Mixture,
            components={
                "earth": fdl.Config(
                    Component,
                    train=tiles("train"),
                    test=tiles("test"),
                    tasks=tasks,
                    augment=dihedral,
                )
            },
            batch_size=256,
        ),
        trunk=_trunk(
            width,
            num_heads=num_heads,
            head_width=128,
            attention_experts=15,
            experts=16,
            num_selected=4,
            expert_hidden=expert_hidden,
            depth=12,
            patch_size=16,
            num_tasks=len(tasks),
            mlp=fdl.Partial(Mlp, activation=exact_gelu),
            class_token="inside",
            position_grid=(14, 14),
            remat=True,
            scan=True,
            dtype="bfloat16",
        ),
        aggregator=fdl.Partial(optim.awl),
        mutual_information_weight=0.005,
        optimizer=fdl.Partial(
            adamw, learning_rate=4e-4, warmup_fraction=0.1, weight_decay=0.05
        ),
        num_steps=100_000,
        mesh=fdl.Config(MeshShape),
        rules=fdl.Config(Rules),
        evaluate_every=5_000,
        checkpoint_every=1_000,
        log_every=50,
        evaluation_batch_size=64,
    )


VARIANTS = {
    "main": main,
    "small": functools.partial(published, 384, num_heads=6, expert_hidden=96),
    "base": functools.partial(published, 768, num_heads=12, expert_hidden=768),
}


def smoke(config: fdl.Config) -> None:
    """Shrinks a config of this file to a few small steps."""
    config.num_steps = 4
    config.evaluate_every = config.checkpoint_every = 2
    config.log_every = 1
    config.evaluation_batch_size = config.evaluation_examples = 32
    config.mesh = fdl.Config(MeshShape)
    if "earth" in config.mixture.components and config.trunk.patch_size == 16:
        config.mixture.batch_size = 32
        for split in ("train", "test"):
            getattr(config.mixture.components["earth"], split).factor = 1
        config.trunk.position_grid = (2, 2)
    config.trunk.width = 24
    config.trunk.num_heads = 3
    config.trunk.depth = 2
    config.trunk.attention[0].num_experts = 4
    for attention in config.trunk.attention:
        attention.head_width = 16
    config.trunk.moe.num_experts = 8
    config.trunk.moe.expert_hidden = 24
