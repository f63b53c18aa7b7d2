"""The published sizes of Mod-Squad, and that its configs run."""

import math

import jax
import jax.numpy as jnp
import pytest

from mtl_jax import configuration
from mtl_jax.train import build_program, validate
from mtl_jax.train.program import count_parameters

TASKS = 13


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    """Flax's norms mix bfloat16 and float32, Optax's schedules floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def heads(width):
    """Parameters of the released heads of Taskonomy's 13 tasks.

    Two classify, into 1,000 and 365 classes, behind a layer norm; the others predict 16
    channels in all, by a linear map of each token to its patch of 16 x 16 pixels.
    """
    classifying = sum(2 * width + (width + 1) * classes for classes in (1000, 365))
    return classifying + 16 * 256 * (width + 1)


@pytest.mark.parametrize(("variant", "millions"), [("small", 34.17), ("base", 195.80)])
def test_parameters_are_those_of_the_released_code(variant, millions):
    config = configuration.load_config(f"mod_squad:{variant}")
    config.trunk.num_tasks = TASKS
    trunk = configuration.build(config).trunk
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

    def init(images):
        return trunk.init(jax.random.key(0), images, 0, train=False)

    params = jax.eval_shape(init, images)["params"]
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    # There, classes have a norm of their own, and the class token a position.
    theirs = ours + 2 * trunk.width + trunk.width + heads(trunk.width)
    assert round(theirs / 1e6, 2) == millions


@pytest.mark.parametrize(
    "variant", ["main", pytest.param("small", marks=pytest.mark.slow)]
)
def test_it_runs(variant):
    config = configuration.load_config(f"mod_squad:{variant}", smoke=True)
    experiment = configuration.build(config)
    validate(experiment)
    program = build_program(experiment)
    total, active = count_parameters(program)
    trunk = program.abstract_state.params["trunk"]
    assert 0 < active < total
    assert trunk["task_embedding"].value.shape[0] == len(experiment.tasks)
    configuration.from_document(configuration.to_document(config, "mod_squad"))
