"""Satellite tiles with a published vision transformer as the trunk, fine-tuned.

Surface, climate, elevation and slope of the Earth from 32 x 32 tiles; the trunk is that
of DINO, ViT-S/8 (Caron et al., 2021), as the transformers library publishes it under
facebook/dino-vits8. Its three files are yours to get, and lie in the folder
``dino-vits8`` unless told otherwise:

    mtl-jax train earth_pretrained --set initialize.load.path=models/dino-vits8

No result is stated, as the project ships no such weights; on two CPU cores a step takes
seconds, so train it on an accelerator. ``--smoke`` and the variant ``fresh`` need no
files.
"""

import fiddle as fdl

from mtl_jax import optim
from mtl_jax.data import Component, Mixture, dihedral
from mtl_jax.data.sources.earth import Earth
from mtl_jax.layers.heads import DensePrediction
from mtl_jax.layers.mlp import Mlp, exact_gelu
from mtl_jax.layers.patch import PatchEmbedding
from mtl_jax.models import VisionTransformer
from mtl_jax.models.pretrained import convert_vit, load_huggingface, warm_start
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

PATCH_SIZE = 8


def _classes(name: str, num_classes: int) -> fdl.Config:
    return fdl.Config(
        Task,
        name=name,
        head=fdl.Config(
            DensePrediction, patch_size=PATCH_SIZE, num_classes=num_classes
        ),
        loss=softmax_cross_entropy,
        metrics=(fdl.Config(accuracy), fdl.Config(mean_iou)),
    )


def _values(name: str) -> fdl.Config:
    return fdl.Config(
        Task,
        name=name,
        head=fdl.Config(DensePrediction, patch_size=PATCH_SIZE),
        loss=huber,
        metrics=(fdl.Config(r2), fdl.Config(mean_absolute_error)),
    )


def _trunk() -> fdl.Config:
    """What ``load_huggingface("dino-vits8", convert_vit).trunk`` is."""
    return fdl.Config(
        VisionTransformer,
        width=384,
        depth=12,
        num_heads=6,
        patch_size=PATCH_SIZE,
        mlp_ratio=4.0,
        num_channels=3,
        embedding=fdl.Partial(
            PatchEmbedding, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        ),
        mlp=fdl.Partial(Mlp, activation=exact_gelu),
        norm_epsilon=1e-12,
        class_token="inside",
        position_grid=(28, 28),
    )


def main() -> fdl.Config:
    """The published trunk under four new heads."""
    tasks = (
        _classes("surface", 2),
        _classes("climate", 5),
        _values("elevation"),
        _values("log_slope"),
    )
    earth = fdl.Config(
        Component,
        train=fdl.Config(Earth, split="train"),
        test=fdl.Config(Earth, split="test"),
        tasks=tuple(task.name for task in tasks),
        augment=dihedral,
    )
    return fdl.Config(
        Experiment,
        tasks=tasks,
        mixture=fdl.Config(Mixture, components={"earth": earth}, batch_size=64),
        trunk=_trunk(),
        aggregator=fdl.Partial(optim.sum),
        optimizer=fdl.Partial(adamw, learning_rate=1e-4),
        initialize=fdl.Partial(
            warm_start,
            load=fdl.Partial(load_huggingface, path="dino-vits8", convert=convert_vit),
        ),
        num_steps=1000,
        mesh=fdl.Config(MeshShape, data=-1),
        rules=fdl.Config(Rules),
        evaluate_every=200,
        checkpoint_every=200,
        log_every=10,
        evaluation_batch_size=64,
        evaluation_examples=256,
    )


def fresh() -> fdl.Config:
    """The same trunk from random parameters, to compare with."""
    config = main()
    config.initialize = None
    return config


VARIANTS = {"main": main, "fresh": fresh}


def smoke(config: fdl.Config) -> None:
    """Shrinks a config of this file to a few small steps, of a trunk that is fresh."""
    config.initialize = None
    config.num_steps = 4
    config.evaluate_every = config.checkpoint_every = 2
    config.log_every = 1
    config.evaluation_batch_size = 32
    config.evaluation_examples = 32
    config.trunk.width = 24
    config.trunk.depth = 2
