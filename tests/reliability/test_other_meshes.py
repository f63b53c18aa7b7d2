"""A checkpoint of one mesh continues on another."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from small import Tiles, experiment

from mtl_jax import optim
from mtl_jax.data import Component, Mixture, training_batches
from mtl_jax.layers.moe.routers import LossFree
from mtl_jax.train import MeshShape, build_program
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.description import describe
from mtl_jax.train.faults import REPORT

FIRST = MeshShape(data=2, expert=4)
BEFORE, AFTER = 3, 20


@pytest.fixture(autouse=True, scope="module")
def standard_dtype_promotion():
    """Optax's Adam divides floats by integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def build(mesh, num_devices):
    """An aggregator with a state and routers with biases, besides Adam's moments."""
    labels = ("bright", "redness")
    tasks = tuple(task for task in experiment().tasks if task.name in labels)
    tiles = Component(Tiles(), Tiles(40, 2), labels)
    chosen = experiment(
        tasks=tasks,
        mixture=Mixture({"tiles": tiles}, batch_size=16),
        num_routers=None,
        aggregator=optim.moco,
        mesh=mesh,
    )
    moe = functools.partial(chosen.trunk.moe, router=LossFree)
    chosen = dataclasses.replace(chosen, trunk=chosen.trunk.clone(moe=moe))
    return build_program(chosen, jax.devices()[:num_devices])


def batches_of(program):
    chosen = program.experiment
    fields = {task.name: task.field for task in chosen.tasks}
    return training_batches(chosen.mixture, fields, chosen.seed, program.share_multiple)


def losses(program, step, state, batches, number):
    """Trains so many steps; returns the state and the losses of the tasks by step."""
    found = []
    for _ in range(number):
        state, metrics = step(state, program.place(next(batches)))
        metrics.pop(REPORT)
        found.append([metrics[f"{t.name}/loss"] for t in program.experiment.tasks])
    return state, np.array(jax.device_get(found))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Checkpoints of the first mesh, and the losses of the steps after."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    program = build(FIRST, 8)
    step, _ = program.compile_step()
    batches = batches_of(program)
    state, _ = losses(program, step, program.init_state(), batches, BEFORE)
    checkpoints = Checkpoints(path, describe(program, None))
    checkpoints.save(BEFORE, state, batches)
    checkpoints.close()
    saved = jax.device_get(
        dataclasses.replace(state, key=jax.random.key_data(state.key))
    )
    _, expected = losses(program, step, state, batches, AFTER)
    return path, saved, expected


@pytest.mark.parametrize(
    ("mesh", "num_devices"),
    [
        (MeshShape(data=1, fsdp=4, expert=2), 8),
        pytest.param(MeshShape(data=1, expert=4), 4, marks=pytest.mark.slow),
        pytest.param(MeshShape(data=2, fsdp=2), 4, marks=pytest.mark.slow),
        pytest.param(MeshShape(), 1, marks=pytest.mark.slow),
        pytest.param(MeshShape(data=2, model=2, expert=2), 8, marks=pytest.mark.slow),
        pytest.param(MeshShape(data=2, fsdp=4), 8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_goes_on_as_before(first, mesh, num_devices):
    path, saved, expected = first
    program = build(mesh, num_devices)
    checkpoints = Checkpoints(path, describe(program, None), read_only=True)
    state = checkpoints.restore_state(BEFORE, program.fresh_state())
    batches = batches_of(program)
    checkpoints.restore_data(BEFORE, batches)
    checkpoints.close()
    # Nothing is lost: optimizer, aggregator, collections, key.
    restored = dataclasses.replace(state, key=jax.random.key_data(state.key))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)
    assert jax.tree.leaves(saved.collections)
    assert len(jax.tree.leaves(saved.aggregator_state)) > 10
    # And all is where this mesh wants it.
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(program.state_shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    step, _ = program.compile_step()
    _, found = losses(program, step, state, batches, AFTER)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
