"""The bare step of benchmarks/step.py: the same update, without a look at numbers."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import small

from mtl_jax import optim
from mtl_jax.data import training_batches
from mtl_jax.models import VisionTransformer
from mtl_jax.train import MeshShape, build_program
from mtl_jax.train.optimizer import sgd

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def build():
    trunk = VisionTransformer(
        width=8, depth=1, num_heads=1, patch_size=small.PATCH, mlp_ratio=1
    )
    chosen = small.experiment(
        trunk=trunk,
        num_experts=0,
        aggregator=optim.pcgrad,
        optimizer=sgd,
        mesh=MeshShape(),
    )
    return build_program(chosen, jax.devices()[:1])


@pytest.mark.slow
def test_it_computes_what_the_step_does(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("step")
    with jax.numpy_dtype_promotion("standard"):
        program = build()
        step, _ = program.compile_step(keep_state=True)
        with benchmark.without_fault_handling():
            bare, _ = build().compile_step(keep_state=True)
        state = program.init_state()
    chosen = program.experiment
    fields = {task.name: task.field for task in chosen.tasks}
    batches = training_batches(chosen.mixture, fields, chosen.seed)
    batch = program.place(next(batches))
    after, metrics = step(state, batch)
    bare_after, bare_metrics = bare(state, batch)
    assert step.as_text().count("is-finite") > bare.as_text().count("is-finite")
    np.testing.assert_allclose(bare_metrics["all/loss"], metrics["all/loss"], rtol=1e-6)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, 1e-6, 1e-7),
        bare_after.params,
        after.params,
    )
    assert metrics["all/update_norm"] > 1e-3
