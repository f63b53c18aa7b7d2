"""An experiment whose task uses some of many experts, for the test of extraction."""

import fiddle as fdl

from mtl_jax import optim
from mtl_jax.data import Component, Mixture
from mtl_jax.data.sources.multi_digits import MultiDigits
from mtl_jax.layers.heads import Classification
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.routers import LossFree
from mtl_jax.models import VisionTransformer
from mtl_jax.sharding import Rules
from mtl_jax.tasks import Task, accuracy, softmax_cross_entropy
from mtl_jax.train import Experiment, MeshShape, adamw


def main():
    """Weights are renormalised, and no token is dropped."""
    tasks = ("left", "right")
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
            for name in tasks
        ),
        mixture=fdl.Config(
            Mixture,
            components={
                "data": fdl.Config(
                    Component,
                    train=fdl.Config(MultiDigits, split="train", size=64),
                    test=fdl.Config(MultiDigits, split="test", size=64),
                    tasks=tasks,
                )
            },
            batch_size=16,
        ),
        trunk=fdl.Config(
            VisionTransformer,
            width=8,
            depth=1,
            num_heads=2,
            patch_size=14,
            num_tasks=2,
            moe=(
                fdl.Partial(
                    MoE,
                    num_experts=24,
                    num_selected=2,
                    expert_hidden=16,
                    group_size=1,
                    capacity_factor=None,
                    router=LossFree,
                ),
            ),
        ),
        aggregator=fdl.Partial(optim.sum),
        optimizer=fdl.Partial(adamw, learning_rate=0.1),
        num_steps=2,
        mesh=fdl.Config(MeshShape, data=8),
        rules=fdl.Config(Rules),
        evaluate_every=2,
        evaluation_batch_size=16,
    )


VARIANTS = {"main": main}


def smoke(config):
    """It is small as it is."""
