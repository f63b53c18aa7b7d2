"""A process whose loss is not finite stops, and its own command finds out why."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LINE = "    values = values + jnp.log(jnp.where(target == 3, -1.0, 1.0))"
LOSSES = f"""
import jax.numpy as jnp

from mtl_jax.tasks import softmax_cross_entropy


def without_threes(prediction, target):
    values, valid = softmax_cross_entropy(prediction, target)
{LINE}
    return values, valid
"""
CONFIG = """
import fiddle as fdl
from losses_of_digits import without_threes

from mtl_jax import optim
from mtl_jax.data import Component, Mixture
from mtl_jax.data.sources.multi_digits import MultiDigits
from mtl_jax.layers.heads import Classification
from mtl_jax.models import VisionTransformer
from mtl_jax.tasks import Task, accuracy, softmax_cross_entropy
from mtl_jax.train import Experiment, adamw


def task(name, loss):
    head = fdl.Config(Classification, num_classes=10)
    return fdl.Config(Task, name, head, loss, (fdl.Config(accuracy),))


def main():
    records = [fdl.Config(MultiDigits, split=s, size=64) for s in ("train", "test")]
    return fdl.Config(
        Experiment,
        tasks=(task("left", without_threes), task("right", softmax_cross_entropy)),
        mixture=fdl.Config(
            Mixture,
            components={
                "pairs": fdl.Config(Component, *records, tasks=("left", "right"))
            },
            batch_size=32,
        ),
        trunk=fdl.Config(
            VisionTransformer,
            width=8,
            depth=1,
            num_heads=2,
            patch_size=14,
            mlp_ratio=1,
        ),
        aggregator=fdl.Partial(optim.pcgrad),
        optimizer=fdl.Partial(adamw),
        num_steps=50,
        max_faulty_steps=4,
        evaluation_batch_size=32,
    )


VARIANTS = {"main": main}
"""


def run(arguments, folder):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, ROOT / "run.py", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_a_run_stops_with_status_3_and_its_command_names_the_operation(tmp_path):
    (tmp_path / "own.py").write_text(CONFIG)
    losses = tmp_path / "losses_of_digits.py"
    losses.write_text(LOSSES)
    arguments = ["train", "own.py", "--workdir", "out", "--devices", "2"]
    stopped = run(arguments, tmp_path)
    assert stopped.returncode == 3, stopped.stderr
    (error,) = stopped.stderr.splitlines()
    assert error.startswith(
        "mtl-jax: error: the loss or gradient of 'left' was not finite at step 4, the "
        "last of 4 faulty steps in a row (records of pairs: "
    )
    where = tmp_path / "out" / "faults" / "4"
    document = json.loads((where / "fault.json").read_text())
    with np.load(where / "batch_0.npz", allow_pickle=False) as file:
        batch = dict(file)
    assert document["losses"]["left"] is None
    assert document["records"] == {"pairs": batch["pairs/index"].tolist()}
    assert 3 in batch["pairs/left/target"]
    command = (where / "command.txt").read_text().strip()
    assert error.endswith(command)

    _, *arguments = shlex.split(command)
    found = run(arguments, tmp_path)
    assert found.returncode == 3, found.stderr
    (error,) = found.stderr.splitlines()
    line = 1 + LOSSES.splitlines().index(LINE)
    assert error.endswith(
        "numbers of 'left' are not finite at step 1: the first NaN is made by the "
        f"primitive log at {losses}:{line} (without_threes)"
    )
