"""What a checkpoint restores, and to whom. Damage is in tests/reliability."""

import dataclasses
import os
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.train import RunFolderError
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.state import TrainState


def state(width=3, **heads):
    return TrainState(
        jnp.int32(2),
        {
            "trunk": {"kernel": jnp.ones((2, width)), "bias": jnp.zeros(width)},
            "heads": {name: jnp.zeros(size) for name, size in heads.items()},
        },
        {"key": jax.random.key(1), "none": None},
        (jnp.zeros(width), ()),
        jax.random.key(0),
    )


def batches():
    return iter(grain.MapDataset.range(9).to_iter_dataset())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints with one of step 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    data = batches()
    next(data)
    checkpoints.save(2, state(a=1), data)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    yield checkpoints
    checkpoints.close()


def test_what_was_saved_is_restored(saved):
    restored = saved.restore_state(2, state(a=1))
    np.testing.assert_array_equal(restored.params["trunk"]["kernel"], np.ones((2, 3)))
    assert restored.key == jax.random.key(0)
    data = batches()
    saved.restore_data(2, data)
    assert next(data) == 1


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        (
            state(width=4, a=1),
            r"params/trunk/bias is float32 \(3,\) in the checkpoint and float32 "
            r"\(4,\) in the config; params/trunk/kernel is float32 \(2, 3\) in the "
            r"checkpoint and float32 \(2, 4\) in the config; optimizer_state/0 is",
        ),
        (
            state(),
            r"params/heads/a is float32 \(1,\) in the checkpoint and absent in the "
            "config; use the config",
        ),
        (state(a=1, b=2), r"heads/b is absent in the checkpoint and float32 \(2,\)"),
        (
            dataclasses.replace(state(a=1), optimizer_state=(jnp.zeros(3, jnp.int8),)),
            r"optimizer_state/0 is float32 \(3,\) in the checkpoint and int8",
        ),
    ],
)
def test_what_differs_is_named(saved, like, expected):
    with pytest.raises(RunFolderError, match=expected) as error:
        saved.restore_state(2, like)
    assert "checkpoints/2 does not fit the config" in str(error.value)


def test_a_save_that_writes_nothing_is_an_error(saved, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(
        RunFolderError, match=r"of step 1 is not written, as .* has one of step 2; move"
    ):
        checkpoints.save(1, state(a=1), batches())
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "2")
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state(a=1), batches())
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_the_first_checkpoint_leaves_a_mark_once_it_is_complete(tmp_path, monkeypatch):
    mark, rename = tmp_path / "first_checkpoint.json", os.rename
    names = []

    def noted(old, new):
        names.append((Path(new).name, mark.exists()))
        rename(old, new)

    monkeypatch.setattr(os, "rename", noted)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 5):
        checkpoints.save(step, state(a=1), batches())
    checkpoints.close()
    assert ("3", False) in names
    assert ("5", True) in names
    assert mark.read_text() == '{"step": 3}\n'


def test_steps_that_reuse_the_memory_of_a_state_do_not_change_what_is_saved(tmp_path):
    """They go on while it is written."""
    step = jax.jit(
        lambda state: dataclasses.replace(
            state, params=jax.tree.map(lambda leaf: leaf + 1, state.params)
        ),
        donate_argnums=0,
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    moving = step(state(width=2**20))
    checkpoints.save(3, moving, batches())
    for _ in range(10):
        moving = step(moving)
    checkpoints.wait()
    kernel = checkpoints.restore_state(3, state(width=2**20)).params["trunk"]["kernel"]
    checkpoints.close()
    np.testing.assert_array_equal(kernel, np.full((2, 2**20), 2.0))
