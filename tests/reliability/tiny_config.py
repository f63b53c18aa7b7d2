"""Experiments that compile in a second: what mutated commands are made from."""

import fiddle as fdl

from mtl_jax import optim
from mtl_jax.data import Component, Mixture, dihedral
from mtl_jax.data.sources.digits import Digits
from mtl_jax.data.sources.earth import Earth
from mtl_jax.data.sources.multi_digits import MultiDigits
from mtl_jax.layers.heads import Classification, DensePrediction
from mtl_jax.layers.moe import MoE, routers
from mtl_jax.models import VisionTransformer
from mtl_jax.sharding import Rules
from mtl_jax.tasks import Task, accuracy, huber, r2, softmax_cross_entropy
from mtl_jax.train import Experiment, MeshShape, adamw


def _digit(name):
    return fdl.Config(
        Task,
        name=name,
        head=fdl.Config(Classification, num_classes=10),
        loss=softmax_cross_entropy,
        metrics=(fdl.Config(accuracy),),
    )


def _experiment(tasks, source, patch_size, **fields):
    return fdl.Config(
        Experiment,
        tasks=tasks,
        mixture=fdl.Config(
            Mixture,
            components={
                "data": fdl.Config(
                    Component,
                    train=fdl.Config(source, split="train"),
                    test=fdl.Config(source, split="test"),
                    tasks=tuple(task.name for task in tasks),
                )
            },
            batch_size=8,
        ),
        trunk=fdl.Config(
            VisionTransformer,
            width=8,
            depth=1,
            num_heads=2,
            patch_size=patch_size,
            mlp_ratio=1,
        ),
        aggregator=fdl.Partial(optim.sum),
        optimizer=fdl.Partial(adamw),
        num_steps=1,
        mesh=fdl.Config(MeshShape, data=8),
        rules=fdl.Config(Rules),
        evaluation_batch_size=8,
        evaluation_examples=8,
        **fields,
    )


def dense():
    """One task, plainly summed."""
    return _experiment((_digit("digit"),), Digits, 14)


def pair():
    """Two tasks whose gradients are combined."""
    config = _experiment((_digit("left"), _digit("right")), MultiDigits, 14)
    for part in ("train", "test"):
        getattr(config.mixture.components["data"], part).size = 64
    config.aggregator = fdl.Partial(optim.pcgrad)
    return config


def summed():
    """Those two tasks, plainly summed: what compiles fastest."""
    config = pair()
    config.aggregator = fdl.Partial(optim.sum)
    return config


def experts():
    """Two tasks with routers of their own, balanced."""
    config = pair()
    config.trunk.depth = 2
    config.trunk.num_tasks = 2
    config.trunk.moe = fdl.Partial(
        MoE,
        num_experts=2,
        num_selected=1,
        expert_hidden=8,
        group_size=1,
        router=fdl.Partial(routers.NoisyTopK),
    )
    config.aggregator = fdl.Partial(optim.dwa)
    return config


def maps():
    """A map of values, perturbed towards flat regions."""
    task = fdl.Config(
        Task,
        name="elevation",
        head=fdl.Config(DensePrediction, patch_size=16),
        loss=fdl.Partial(huber),
        metrics=(fdl.Config(r2),),
    )
    config = _experiment((task,), Earth, 16)
    config.mixture.components["data"].augment = dihedral
    config.sharpness = fdl.Partial(optim.sharpness_aware, rho=0.05)
    return config


VARIANTS = {
    "dense": dense,
    "pair": pair,
    "summed": summed,
    "experts": experts,
    "maps": maps,
}


def smoke(config):
    """They are small already."""
    config.num_steps = 1
