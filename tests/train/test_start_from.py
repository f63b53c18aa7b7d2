"""Runs that start from another run's parameters, and leave those as they are."""

import functools
import shutil

import jax
import numpy as np
import pytest
from small import PATCH, experiment

from mtl_jax.data.mixture import training_batches
from mtl_jax.layers.moe.routers import ExpertChoice, LossFree
from mtl_jax.models import VisionTransformer
from mtl_jax.models.experts import extend, upcycle
from mtl_jax.train import (
    RunFolderError,
    adamw,
    build_program,
    check_initialize,
    validate,
)
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.start_from import check_growth, start_from, train_new


def save(program, folder):
    """Writes the checkpoint of a run that has not begun; returns its state."""
    fields = {task.name: task.field for task in program.experiment.tasks}
    batches = training_batches(
        program.experiment.mixture, fields, 0, program.share_multiple
    )
    state = program.init_state()
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(0, state, batches)
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a dense run, at its start, and the parameters in it."""
    folder = tmp_path_factory.mktemp("dense")
    trunk = VisionTransformer(
        width=16, depth=2, num_heads=2, patch_size=PATCH, mlp_ratio=1
    )
    program = build_program(experiment(num_experts=0, trunk=trunk))
    return folder, jax.device_get(save(program, folder).params)


def test_it_reads_what_the_other_run_wrote(run):
    folder, params = run
    read = start_from({}, run=str(folder), make=lambda fresh, saved: saved)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(read))


def test_it_passes_over_what_is_damaged_and_says_so(run, tmp_path, capsys):
    other = shutil.copytree(run[0], tmp_path / "other")
    newer = shutil.copytree(other / "checkpoints" / "0", other / "checkpoints" / "10")
    large = max((newer / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    large.write_bytes(bytes(large.stat().st_size))
    read = start_from({}, run=str(other), make=lambda fresh, saved: saved)
    jax.tree.map(np.testing.assert_array_equal, read, run[1])
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"parameters from step 0 of {other}; the checkpoint {newer}"
    )
    assert first.endswith(" has another content)")


def test_an_upcycled_run_starts_with_the_perceptrons_as_experts(run, capsys):
    folder, params = run
    start = functools.partial(start_from, run=str(folder), make=upcycle)
    trunk = experiment().trunk.clone(mlp_ratio=1)
    program = build_program(experiment(trunk=trunk, initialize=start))
    check_initialize(start, program.abstract_params())
    experts = program.init_state().params["trunk"]["block_1"]["moe"]["experts"]
    printed = capsys.readouterr().out
    # Once, though it was checked by its shapes before.
    assert printed.count("parameters from step 0 of") == 1
    assert "made of those of other names: 4 (trunk/block_1/moe/experts/" in printed
    assert "(trunk/block_1/moe/router/gate/kernel" in printed
    mlp = params["trunk"]["block_1"]["mlp"]
    jax.tree.map(
        lambda copies, leaf: np.testing.assert_array_equal(
            copies, np.broadcast_to(leaf, copies.shape)
        ),
        experts,
        mlp,
    )


@pytest.mark.slow
def test_nothing_of_the_other_run_moves(run):
    folder, params = run
    optimizer = functools.partial(train_new, optimizer=adamw, run=str(folder))
    update = optimizer(num_steps=3)
    gradient = jax.tree.map(np.ones_like, params)
    updates, _ = update.update(gradient, update.init(params), params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    grown = jax.tree.map(np.asarray, params)
    grown["heads"]["more"] = jax.tree.map(np.copy, grown["heads"]["phase"])
    gradient = jax.tree.map(np.ones_like, grown)
    state = update.init(grown)
    for _ in range(2):  # The learning rate begins at 0.
        updates, state = update.update(gradient, state, grown)
    moved = {
        name: any(np.any(leaf) for leaf in jax.tree.leaves(head))
        for name, head in updates["heads"].items()
    }
    assert moved == {**dict.fromkeys(params["heads"], False), "more": True}


def test_a_run_that_keeps_more_than_parameters_is_refused(run, tmp_path):
    """Biases would begin anew, and those of old experts go on moving."""
    trunk = experiment().trunk.clone(mlp_ratio=1)
    trunk = trunk.clone(moe=functools.partial(trunk.moe, router=LossFree))
    start = functools.partial(start_from, run=str(run[0]), make=upcycle)
    program = build_program(experiment(trunk=trunk, initialize=start))
    # From a dense one it may begin, with biases of its own.
    check_initialize(start, program.abstract_params())
    state = save(program, tmp_path)
    biases = jax.tree.leaves(state.collections["balance"])
    assert biases
    assert not any(np.any(bias) for bias in biases)
    refused = rf"run is '{tmp_path}', whose trunk keeps 'balance' .* any but LossFree"
    with pytest.raises(ValueError, match=refused):
        train_new(3, optimizer=adamw, run=str(tmp_path))
    again = functools.partial(start_from, run=str(tmp_path), make=extend)
    with pytest.raises(ValueError, match=f"initialize: {refused}"):
        check_initialize(again, program.abstract_params())


def test_folders_without_checkpoints_are_named(run, tmp_path):
    with pytest.raises(RunFolderError, match="has no checkpoints to start from"):
        start_from({}, run=str(tmp_path), make=extend)
    with pytest.raises(RunFolderError, match="has no checkpoints to start from"):
        train_new(3, optimizer=adamw, run=str(tmp_path))
    damaged = tmp_path / "damaged"
    shutil.copytree(run[0], damaged)
    (damaged / "checkpoints" / "0" / "state" / "_METADATA").unlink()
    for read in (
        lambda: train_new(3, optimizer=adamw, run=str(damaged)),
        lambda: start_from({}, run=str(damaged), make=extend),
    ):
        with pytest.raises(
            RunFolderError,
            match=r"checkpoints/0 is damaged \(state/_METADATA is missing\), and there",
        ):
            read()


def test_a_checkpoint_of_another_number_of_experts_is_named(tmp_path):
    """Continuing is refused, as is growing with a capacity; it is said what to do."""
    save(build_program(experiment(num_experts=4)), tmp_path)
    start = functools.partial(start_from, run=str(tmp_path), make=extend)
    larger = experiment(num_experts=8, initialize=start)
    with pytest.raises(
        ValueError,
        match=r"capacity_factor is 1\.25 in block_1, which has 4 experts in .* and 8 "
        r"here; .* train both runs with capacity_factor=None",
    ):
        validate(larger)
    # With no capacity it may, and so may more tasks with as many experts.
    moe = functools.partial(larger.trunk.moe, capacity_factor=None)
    check_growth(start, larger.trunk.clone(moe=moe))
    check_growth(start, experiment(num_experts=4, num_routers=5).trunk)
    # One in evaluation alone changes predictions as well.
    limited = functools.partial(moe, evaluation_capacity_factor=1.5)
    with pytest.raises(ValueError, match=r"capacity_factor is 1\.5 in block_1"):
        check_growth(start, larger.trunk.clone(moe=limited))
    # Such a router's experts take fewer tokens too, whatever the layer's own field is.
    moe = functools.partial(moe, router=ExpertChoice)
    with pytest.raises(ValueError, match=r"capacity_factor is 2\.0 in block_1"):
        check_growth(start, larger.trunk.clone(moe=moe))
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    try:
        other = build_program(experiment(num_experts=8))
        with pytest.raises(
            RunFolderError,
            match=r"block_1/moe/experts/.* is float32 \(4, .*\) in the checkpoint and "
            r"float32 \(8, .*use the config that it was trained with, or start a run "
            "of its own from it",
        ):
            checkpoints.restore_state(0, other.fresh_state())
    finally:
        checkpoints.close()
