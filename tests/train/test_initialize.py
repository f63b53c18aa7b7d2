import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import experiment

from mtl_jax.models import VisionTransformer
from mtl_jax.train import (
    MeshShape,
    Program,
    RunFolder,
    build_program,
    check_initialize,
    train,
)

MESH = MeshShape(data=2, fsdp=2, model=2)


def pretrained(params):
    """Fresh parameters with arrays of the host for the trunk's embedding."""
    trunk = params["trunk"]
    kernel = trunk["embedding"]["projection"]["kernel"]
    filled = np.arange(kernel.size, dtype=np.float32).reshape(kernel.shape)
    embedding = {"projection": {**trunk["embedding"]["projection"], "kernel": filled}}
    return {**params, "trunk": {**trunk, "embedding": embedding}}


def keep_initial(num_steps):
    """An optimizer that keeps the parameters that it started from."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.copy, params),
        lambda gradients, state, params=None: (gradients, state),
    )


def small(**fields):
    trunk = VisionTransformer(width=16, depth=1, num_heads=2, patch_size=4)
    return experiment(num_experts=0, trunk=trunk, **fields)


@functools.cache
def program(**fields):
    return build_program(small(mesh=MESH, optimizer=keep_initial, **fields))


def test_a_run_starts_from_what_initialize_makes_sharded_as_fresh_ones():
    fresh = program().init_state()
    started = program(initialize=pretrained).init_state()
    expected = pretrained(jax.device_get(fresh.params))
    jax.tree.map(np.testing.assert_array_equal, started.params, expected)
    # What the optimizer keeps is of these parameters.
    jax.tree.map(np.testing.assert_array_equal, started.optimizer_state, expected)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    assert jax.tree.map(lambda leaf: leaf.sharding, started) == shardings
    kernel = started.params["trunk"]["embedding"]["projection"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (48, 8)
    assert jax.random.key_data(started.key).tolist() == (
        jax.random.key_data(fresh.key).tolist()
    )


@pytest.mark.parametrize(
    ("initialize", "message"),
    [
        (
            lambda params: {**params, "heads": {}},
            "makes heads/bright/.* absent, which is float32 .* and 11 more differ",
        ),
        (
            lambda params: {**params, "body": jnp.zeros(3)},
            "makes body float32 .3,., which is absent in the model, and 0 more",
        ),
        (
            lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params),
            "bfloat16 .*, which is float32",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(initialize, message):
    params = nn.unbox(program().abstract_state.params)
    with pytest.raises(ValueError, match=f"initialize .*{message}"):
        check_initialize(initialize, params)
    with pytest.raises(ValueError, match=f"initialize .*{message}"):
        program(initialize=initialize).init_state()


class StoppedError(Exception):
    pass


def test_a_run_that_continues_is_not_initialized_again(tmp_path, monkeypatch):
    calls = []

    def initialize(params):
        calls.append(params)
        return pretrained(params)

    chosen = small(initialize=initialize, num_steps=1)
    built = build_program(chosen, jax.devices()[:1])
    train(built, RunFolder(tmp_path), "small")
    assert len(calls) == 1

    def stop(self):
        raise StoppedError

    # It compiles the step once it has its state.
    monkeypatch.setattr(Program, "compile_step", stop)
    with pytest.raises(StoppedError):
        train(built, RunFolder(tmp_path), "small")
    assert len(calls) == 1
