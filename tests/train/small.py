"""A small experiment on made-up data: two sources, four tasks, every kind of label."""

import dataclasses
import functools

import flax.linen as nn
import numpy as np

from mtl_jax import optim
from mtl_jax.data import Component, Field, Mixture
from mtl_jax.layers.heads import Classification, DensePrediction
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.models import VisionTransformer
from mtl_jax.tasks import Task, accuracy, r2, softmax_cross_entropy, squared_error
from mtl_jax.train import Experiment, MeshShape, adamw

SIDE, PATCH = 8, 4


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Coloured squares with two dense targets, one of them partly unlabelled."""

    size: int = 64
    seed: int = 0

    @property
    def fields(self):
        return {
            "image": Field((SIDE, SIDE, 3), "uint8"),
            "bright": Field((SIDE, SIDE), "int32", 2, ("dark", "bright")),
            "redness": Field((SIDE, SIDE), "float32"),
        }

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        bright = (image.mean(-1) > 127).astype(np.int32)
        bright[0] = -1
        redness = image[..., 0].astype(np.float32) / 255
        redness[:, 0] = np.nan
        return {"image": image, "bright": bright, "redness": redness}


@dataclasses.dataclass(frozen=True)
class Stripes:
    """Grey images of rows or columns, with their direction and their phase."""

    size: int = 48
    seed: int = 1

    @property
    def fields(self):
        return {
            "image": Field((SIDE, SIDE, 1), "uint8"),
            "direction": Field((), "int32", 2, ("rows", "columns")),
            "phase": Field((), "int32", 3),
        }

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        direction, phase = int(rng.integers(2)), int(rng.integers(3))
        line = ((np.arange(SIDE) + phase) % 3 == 0).astype(np.uint8) * 200
        image = np.broadcast_to(line[:, None], (SIDE, SIDE))
        image = image.T if direction else image
        return {
            "image": np.ascontiguousarray(image)[..., None],
            "direction": np.int32(direction),
            "phase": np.int32(phase),
        }


def classes(name, head):
    return Task(name, head, softmax_cross_entropy, (accuracy(),))


def experiment(
    *, num_routers: int | None = 4, num_experts: int = 4, **fields
) -> Experiment:
    """The experiment, with any of its fields replaced.

    Args:
      num_routers: Number of task routers; None for a trunk that tasks share.
      num_experts: Number of experts; 0 for a dense trunk.
      **fields: Replacements.
    """
    moe = None
    if num_experts:
        moe = functools.partial(
            MoE,
            num_experts=num_experts,
            expert_hidden=16,
            group_size=1,
            router=functools.partial(
                NoisyTopK,
                gate=functools.partial(Gate, kernel_init=nn.initializers.normal(0.3)),
            ),
        )

    defaults = {
        "tasks": (
            classes("bright", DensePrediction(PATCH, 2, hidden=8)),
            Task("redness", DensePrediction(PATCH, hidden=8), squared_error, (r2(),)),
            classes("direction", Classification(2)),
            classes("phase", Classification(3)),
        ),
        "mixture": Mixture(
            {
                "tiles": Component(Tiles(), Tiles(40, 2), ("bright", "redness")),
                "stripes": Component(
                    Stripes(), Stripes(24, 3), ("direction", "phase"), weight=1.0
                ),
            },
            batch_size=16,
        ),
        "trunk": VisionTransformer(
            width=16,
            depth=2,
            num_heads=2,
            patch_size=PATCH,
            mlp_ratio=2,
            moe=moe,
            num_tasks=num_routers if num_experts else None,
        ),
        "aggregator": optim.sum,
        "optimizer": adamw,
        "num_steps": 6,
        "mesh": MeshShape(data=-1, expert=4),
        "evaluate_every": 3,
        "checkpoint_every": 2,
        "log_every": 1,
        "evaluation_batch_size": 16,
    }
    return Experiment(**(defaults | fields))
