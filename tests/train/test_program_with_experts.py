"""One device equals eight, with experts on the mesh and other parts of a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Stripes, classes, experiment
from steps import run

from mtl_jax import optim
from mtl_jax.data import Component, Mixture
from mtl_jax.layers.heads import Classification
from mtl_jax.train import MeshShape

pytestmark = pytest.mark.slow

STEPS = 4


def descent(num_steps):
    # Not Adam, whose steps hide the size of gradients.
    return optax.sgd(0.1, momentum=0.9)


def accumulating(num_steps):
    several = optax.MultiSteps(descent(num_steps), every_k_schedule=2)
    return several.gradient_transformation()


def chosen(*, num_routers=2, dtype=jnp.float32, **fields):
    """Two tasks of one source, with experts split over four devices."""
    stripes = Component(Stripes(), Stripes(24, 3), ("direction", "phase"))
    defaults = {
        "tasks": (
            classes("direction", Classification(2)),
            classes("phase", Classification(3)),
        ),
        "mixture": Mixture({"stripes": stripes}, batch_size=16),
        "optimizer": descent,
        "mesh": MeshShape(data=2, expert=4),
    }
    small = experiment(num_routers=num_routers, **(defaults | fields))
    return dataclasses.replace(small, trunk=small.trunk.clone(dtype=dtype))


def on_one_and_on_eight(experiment):
    one, eight = (run(experiment, jax.devices()[:n], STEPS) for n in (1, 8))
    # Losses, then parameters.
    assert np.ptp(one[0], axis=0).min() > 1e-3, "training must move them"
    return one, eight


def largest_difference(ours, theirs):
    """In units of each array's largest entry, or of 0.01 where all are smaller."""
    return max(
        np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-2)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"sharpness": functools.partial(optim.sharpness_aware, rho=0.1)},
        {"aggregator": optim.pcgrad, "gradients_at": "features", "num_routers": None},
        {"aggregator": optim.pcgrad, "gradients_at": "params"},
        {"optimizer": accumulating},
    ],
    ids=["sharpness", "features", "params", "accumulation"],
)
def test_steps_are_the_same_on_one_device_and_on_eight(fields):
    (losses, params), eight = on_one_and_on_eight(chosen(**fields))
    np.testing.assert_allclose(eight[0], losses, rtol=1e-5)
    assert largest_difference(eight[1], params) < 1e-5


def test_steps_in_bfloat16_agree_to_its_precision():
    (losses, params), eight = on_one_and_on_eight(chosen(dtype=jnp.bfloat16))
    # Every example by itself is computed the same; sums over them are rounded, and a
    # parameter that began at zero is the sum of such of every step.
    np.testing.assert_allclose(eight[0][0], losses[0], rtol=1e-5)
    np.testing.assert_allclose(eight[0], losses, rtol=2**-8)
    assert largest_difference(eight[1], params) < STEPS * 2**-8


def looped(*, remat, **fields):
    """Four blocks in a loop, gradients of two batches a step, all axes but data."""
    mesh = MeshShape(data=1, fsdp=2, expert=2, model=2)
    small = chosen(mesh=mesh, optimizer=accumulating, **fields)
    trunk = small.trunk.clone(depth=4, scan=True, remat=remat)
    return dataclasses.replace(small, trunk=trunk)


@functools.cache
def looped_on_one_device():
    """In float32, with nothing recomputed."""
    one = run(looped(remat=False), jax.devices()[:1], 6)
    assert np.ptp(one[0], axis=0).min() > 1e-3, "training must move them"
    return one


@pytest.mark.parametrize(
    ("dtype", "loss_error", "params_error"),
    [(jnp.float32, 1e-5, 1e-5), (jnp.bfloat16, 2**-8, 6 * 2**-8)],
    ids=["float32", "bfloat16"],
)
def test_recomputed_blocks_in_a_loop_on_three_axes(dtype, loss_error, params_error):
    losses, params = looped_on_one_device()
    eight = run(looped(remat=True, dtype=dtype), jax.devices(), 6)
    np.testing.assert_allclose(eight[0], losses, rtol=loss_error)
    assert largest_difference(eight[1], params) < params_error
