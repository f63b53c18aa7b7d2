"""Compares what two runs left in their folders."""

import json

import jax
import numpy as np

from mtl_jax.train import loop
from mtl_jax.train.checkpoint import Checkpoints


def assert_same_run(program, ours, theirs, step=6):
    """The same metrics and the same state at a step, to the last bit."""
    expected = (theirs.path / loop.METRICS).read_bytes()
    assert (ours.path / loop.METRICS).read_bytes() == expected
    jax.tree.map(
        lambda mine, yours: np.testing.assert_array_equal(
            _as_numpy(mine), _as_numpy(yours)
        ),
        _state(program, ours, step),
        _state(program, theirs, step),
    )


def timing_lines(folder):
    lines = (folder.path / loop.TIMINGS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def _state(program, folder, step):
    checkpoints = Checkpoints(folder.path / loop.CHECKPOINTS, read_only=True)
    state = checkpoints.restore_state(step, program.fresh_state())
    checkpoints.close()
    return state


def _as_numpy(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)
