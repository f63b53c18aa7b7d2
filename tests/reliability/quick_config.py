"""An experiment that compiles in a second or two, for runs that are killed often."""

import fiddle as fdl

from mtl_jax import optim
from mtl_jax.data import Component, Mixture
from mtl_jax.data.sources.multi_digits import MultiDigits
from mtl_jax.layers.heads import Classification
from mtl_jax.models import VisionTransformer
from mtl_jax.tasks import Task, accuracy, softmax_cross_entropy
from mtl_jax.train import Experiment, MeshShape, adamw

TASKS = ("left", "right")


def main() -> fdl.Config:
    """Two tasks."""
    return fdl.Config(
        Experiment,
        tasks=tuple(
            fdl.Config(
                Task,
                name=name,
                head=fdl.Config(Classification, num_classes=10),
                loss=softmax_cross_entropy,
                metrics=(fdl.Config(accuracy),),
            )
            for name in TASKS
        ),
        mixture=fdl.Config(
            Mixture,
            components={
                "pairs": fdl.Config(
                    Component,
                    train=fdl.Config(MultiDigits, split="train", size=64),
                    test=fdl.Config(MultiDigits, split="test", size=32),
                    tasks=TASKS,
                )
            },
            batch_size=8,
        ),
        trunk=fdl.Config(
            VisionTransformer,
            width=8,
            depth=1,
            num_heads=1,
            patch_size=14,
            mlp_ratio=2,
        ),
        aggregator=fdl.Partial(optim.sum),
        optimizer=fdl.Partial(adamw),
        num_steps=30,
        mesh=fdl.Config(MeshShape),
        evaluate_every=15,
        checkpoint_every=4,
        log_every=1,
        evaluation_batch_size=8,
        evaluation_examples=16,
    )


def moco() -> fdl.Config:
    """An aggregator that keeps a gradient for each task; computes in bfloat16."""
    config = main()
    config.trunk.dtype = "bfloat16"
    config.aggregator = fdl.Partial(optim.moco)
    return config


VARIANTS = {"main": main, "moco": moco}
