"""A small experiment one of whose tasks goes wrong where its target says so."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from small import PATCH, SIDE, Stripes, Tiles, classes, experiment

from mtl_jax.data import Component, Mixture
from mtl_jax.layers.heads import Classification, DensePrediction
from mtl_jax.models import VisionTransformer
from mtl_jax.tasks import Task, r2, squared_error

# Targets that the loss below goes wrong at, and how.
NAN_LOSS, INFINITE_LOSS, NAN_GRADIENT, BIG_LOSS = -7.0, -8.0, -9.0, -10.0


def troubled(prediction, target):
    """The squared error, but for the targets above."""
    values, valid = squared_error(prediction, target)
    # A constant for the gradient: the loss alone is NaN.
    values += jnp.log(jnp.where(target == NAN_LOSS, -1.0, 1.0))
    values *= jnp.where(target == INFINITE_LOSS, jnp.inf, 1.0)
    # The slope of a root at zero is infinite, and what is under it has none.
    flat = jnp.where(target == NAN_GRADIENT, 0.0 * prediction, 1.0)
    values += jnp.sqrt(flat) - 1.0
    return values * jnp.where(target == BIG_LOSS, 1e3, 1.0), valid


@dataclasses.dataclass(frozen=True)
class TroubledTiles(Tiles):
    """Tiles of which some have a target that the loss goes wrong at."""

    trouble: tuple[tuple[int, float], ...] = ()

    def __getitem__(self, index):
        record = super().__getitem__(index)
        for place, target in self.trouble:
            if place == index:
                record["redness"] = np.full((SIDE, SIDE), target, np.float32)
        return record


def faulty_experiment(*, trouble=(), **fields):
    """Three tasks on two sources; the first, ``redness``, may go wrong.

    Args:
      trouble: (record of the tiles, target) pairs.
      **fields: Replacements.
    """
    defaults = {
        "num_experts": 0,
        "tasks": (
            Task("redness", DensePrediction(PATCH, hidden=4), troubled, (r2(),)),
            classes("direction", Classification(2)),
            classes("phase", Classification(3)),
        ),
        "trunk": VisionTransformer(
            width=8, depth=1, num_heads=2, patch_size=PATCH, mlp_ratio=1
        ),
        "mixture": Mixture(
            {
                "tiles": Component(
                    TroubledTiles(trouble=trouble), Tiles(40, 2), ("redness",)
                ),
                "stripes": Component(Stripes(), Stripes(24, 3), ("direction", "phase")),
            },
            batch_size=16,
        ),
    }
    return experiment(**(defaults | fields))


def with_target(batch, row, target):
    """The batch with another target of ``redness`` for one of the tiles."""
    tiles = batch["tiles"]
    redness = tiles.targets["redness"].at[row].set(target)
    return {**batch, "tiles": dataclasses.replace(tiles, targets={"redness": redness})}


def without_labels(batch, source):
    """The batch with no label of any task on a source."""
    examples = batch[source]
    mask = {task: jnp.zeros_like(rows) for task, rows in examples.mask.items()}
    return {**batch, source: dataclasses.replace(examples, mask=mask)}
