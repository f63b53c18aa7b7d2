"""Checkpoints of each release are read, and their runs go on as they did then.

How one is made is in fixtures/release.py.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import __version__, configuration
from mtl_jax.train import RunFolder, build_program, loop, train
from mtl_jax.train.checkpoint import Checkpoints

FIXTURES = Path(__file__).parent / "fixtures"

EXPECTED = {
    "0.1.0": {
        "expert": [
            *(-0.6847280859947205, -0.26214271783828735),
            *(-0.043482404202222824, 0.2666034400463104),
        ],
        "moment": [
            *(-0.0046739173121750355, 0.006195674184709787, 0.01869567483663559),
            *(-0.028043508529663086, 0.0061956737190485, 0.006195673253387213),
            *(0.01869567483663559, -0.038913097232580185, -0.003043508855625987),
            0.01869567483663559,
        ],
        "router": [
            0.0020000000949949026,
            -0.0020000000949949026,
            -0.0020000000949949026,
        ],
        "key": [4165894930, 804218099],
        "losses": [4.606289863586426, 4.604222774505615],
    },
}
"""What Orbax alone read of them, and the losses of the next two steps."""


@pytest.fixture(params=sorted(EXPECTED))
def release(request, tmp_path):
    """The values that are expected, and a copy of the run folder."""
    shutil.copytree(FIXTURES / request.param, tmp_path / "run")
    return EXPECTED[request.param], tmp_path / "run"


def test_there_is_a_checkpoint_of_each_release():
    kept = {path.parent.name for path in FIXTURES.glob("*/checkpoints")}
    assert kept == set(EXPECTED)
    assert __version__ in kept
    for name in kept:
        files = [path for path in (FIXTURES / name).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 200_000


# Optax's Adam divides floats by integer powers.
@jax.numpy_dtype_promotion("standard")
def test_it_is_read_and_its_run_goes_on(release):
    expected, path = release
    document = json.loads((path / "checkpoints/2/run/metadata").read_text())["config"]
    config = configuration.from_document(document, ())
    program = build_program(configuration.build(config))
    checkpoints = Checkpoints(path / "checkpoints", read_only=True)
    step, state = checkpoints.restore_newest(program.fresh_state)
    checkpoints.close()
    assert step == state.step == 2
    trunk = state.params["trunk"]
    adam = state.optimizer_state[1].inner_state[0]
    for name, found in {
        "expert": trunk["block_0"]["moe"]["experts"]["up"]["kernel"][2, 3],
        "moment": adam.mu["heads"]["left"]["logits"]["bias"],
        "router": state.collections["balance"]["block_0"]["moe"]["router"]["bias"],
        "key": jax.random.key_data(state.aggregator_state.key),
    }.items():
        np.testing.assert_array_equal(
            found, np.asarray(expected[name], found.dtype), err_msg=name
        )
    train(program, RunFolder(path), "release")
    lines = (path / loop.METRICS).read_text().splitlines()
    losses = [json.loads(line)["all/loss"] for line in lines]
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
