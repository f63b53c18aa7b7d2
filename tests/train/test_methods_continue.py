"""Every method that the trainer takes goes on from a checkpoint to the last bit."""

import dataclasses
import functools
import inspect
import itertools

import jax
import numpy as np
import optax
import pytest
from small import PATCH, Tiles, classes, experiment

from mtl_jax import optim
from mtl_jax.data import Component, Mixture, training_batches
from mtl_jax.layers.heads import DensePrediction
from mtl_jax.models import VisionTransformer
from mtl_jax.tasks import Task, r2, squared_error
from mtl_jax.train import MeshShape, build_program
from mtl_jax.train.checkpoint import Checkpoints

SAVED, LAST = 2, 5

KINDS = (optim.Aggregator, optim.Balancer)
MADE_BY = {
    name: make
    for name in optim.__all__
    if inspect.isfunction(make := getattr(optim, name))
    and inspect.signature(make).return_annotation in KINDS
}
"""What makes aggregators and balancers, by its public name."""

# What a method cannot do without, or what has its state change within a few steps.
ARGUMENTS = {
    "constant": {"weights": (0.5, 0.3, 0.2)},
    "db_mtl": {"sigma": 0.1},
    "dwa": {"window": 2},
    "stch": {"warmup_steps": 2},
}
METHODS = {
    name: functools.partial(make, **ARGUMENTS.get(name, {}))
    for name, make in MADE_BY.items()
    if next(iter(inspect.signature(make).parameters)) == "num_tasks"
}

# Made of other methods, which have a state of their own where they take one.
COMBINED = {
    "chain_after": lambda num_tasks: optim.chain_after(
        optim.gradvac(num_tasks), optax.trace(0.9)
    ),
    "every": lambda num_tasks: optim.every(optim.pcgrad(num_tasks), 2),
    "flat_regions": lambda num_tasks: optim.flat_regions(
        optim.gradvac(num_tasks), direct=True
    ),
    "from_balancer": lambda num_tasks: optim.from_balancer(
        optim.rlw(num_tasks), num_tasks
    ),
    "grouped": lambda num_tasks: optim.grouped(
        optim.gradvac, num_tasks, r"(attention|mlp)/"
    ),
    "momentum": lambda num_tasks: optim.momentum(optim.gradvac(num_tasks)),
    "normalize": lambda num_tasks: optim.normalize(optim.gradnorm(num_tasks), "loss+"),
    "where": lambda num_tasks: optim.where(
        lambda path: "mlp" in path, optim.gradvac(num_tasks)
    ),
}
# What methods are made with.
BUILDERS = {"from_cross_gramian", "from_rows", "from_weights", "make_balancer"}
# They need gradients of more batches, which the trainer does not take.
REFUSED = {"modo", "sdmgrad"}

CASES = {
    name: {"aggregator": make}
    for name, make in (METHODS | COMBINED).items()
    if name not in REFUSED
} | {
    "at_features": {"aggregator": optim.pcgrad, "gradients_at": "features"},
    "sharpness_aware": {
        "aggregator": optim.gradvac,
        "sharpness": functools.partial(optim.sharpness_aware, rho=0.05),
    },
}
QUICK = ("momentum", "float32")


def build(dtype, **fields):
    """A program with three tasks, as small as can be."""
    tasks = (
        classes("bright", DensePrediction(PATCH, 2)),
        Task("redness", DensePrediction(PATCH), squared_error, (r2(),)),
        dataclasses.replace(
            classes("shade", DensePrediction(PATCH, 2)), target="bright"
        ),
    )
    labels = tuple(task.name for task in tasks)
    tiles = Component(Tiles(), Tiles(8, 2), labels)
    chosen = experiment(
        tasks=tasks,
        mixture=Mixture({"tiles": tiles}, batch_size=8),
        trunk=VisionTransformer(
            width=8, depth=1, num_heads=1, patch_size=PATCH, mlp_ratio=1, dtype=dtype
        ),
        num_experts=0,
        num_steps=LAST,
        mesh=MeshShape(),
        evaluation_batch_size=8,
        **fields,
    )
    return build_program(chosen, jax.devices()[:1])


def batches_of(program):
    chosen = program.experiment
    fields = {task.name: task.field for task in chosen.tasks}
    return training_batches(chosen.mixture, fields, chosen.seed, program.share_multiple)


def go_on(program, step, state, batches, number):
    """The state after so many steps, and the metrics of each of them."""
    lines = []
    for _ in range(number):
        state, metrics = step(state, program.place(next(batches)))
        lines.append(jax.device_get(metrics))
    return state, lines


def as_bytes(tree):
    """Every array of a tree, by its path, to the last bit."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        found[jax.tree_util.keystr(path)] = array.dtype, array.shape, array.tobytes()
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*case, marks=[] if case == QUICK else pytest.mark.slow)
        for case in itertools.product(CASES, ("float32", "bfloat16"))
    ],
)
def test_any_method_continues_to_the_last_bit(tmp_path, name, dtype):
    program = build(dtype, **CASES[name])
    step, _ = program.compile_step()
    batches = batches_of(program)
    state, _ = go_on(program, step, program.init_state(), batches, SAVED)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(SAVED, state, batches)
    saved = as_bytes(state)
    expected = go_on(program, step, state, batches, LAST - SAVED)
    checkpoints.close()

    checkpoints, batches = Checkpoints(tmp_path), batches_of(program)
    state = checkpoints.restore_state(SAVED, like=expected[0])
    checkpoints.restore_data(SAVED, batches)
    checkpoints.close()
    assert as_bytes(state) == saved
    found = go_on(program, step, state, batches, LAST - SAVED)
    assert as_bytes(found) == as_bytes(expected)


def test_every_method_is_among_them():
    """A new method is by itself; what is made in another way needs a place above."""
    assert len(METHODS) > 30
    assert MADE_BY.keys() == METHODS.keys() | COMBINED.keys() | BUILDERS


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_others_are_refused(name):
    with pytest.raises(ValueError, match="aggregator: second is missing"):
        build("float32", aggregator=METHODS[name])
