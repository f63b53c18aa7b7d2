"""The search for the largest batch, with a compiler whose memory is known."""

import dataclasses
import importlib

import jax
import pytest

from mtl_jax import configuration
from mtl_jax.scaling.chips import CHIPS
from mtl_jax.scaling.compile import Bytes, Estimate, OutOfMemoryError
from mtl_jax.scaling.roofline import Roofline
from mtl_jax.scaling.topology import Topology

CAPACITY = 16 * 2**30

# The package has a function of the same name.
module = importlib.import_module("mtl_jax.scaling.search")


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    """Optax's schedules mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def topology():
    return Topology("v5e:2x4", CHIPS["v5e"], (2, 4, 1), tuple(jax.devices()))


@pytest.fixture
def experiment():
    """One source; a batch is a multiple of 8 devices."""
    config = configuration.load_config("earth_digits:single_digit", smoke=True)
    config.mixture.batch_size = 64
    return configuration.build(config)


def compiler(monkeypatch, *, fixed, slopes, seconds):
    """Memory is linear in the batch, and time too: by whether it recomputes."""
    tried = []

    def estimate(experiment, topology, *, optimized=True):
        size, remat = experiment.mixture.batch_size, experiment.trunk.remat
        tried.append((remat, size))
        peak = fixed + slopes[remat] * size
        if peak > CAPACITY:
            raise OutOfMemoryError("does not fit")
        return Estimate(
            topology="v5e:2x4",
            chips=8,
            mesh={},
            batch_size=size,
            remat=remat,
            total_parameters=1,
            active_parameters=1,
            bytes=Bytes(0, 0, 0, 0, 0, int(peak), CAPACITY),
            flops=1,
            useful_flops=1,
            chip_flops=1,
            memory_bytes=1,
            collectives=(),
            roofline=Roofline(seconds[remat] * size + 1e-3, 0.0, {}, {}),
            optimized=optimized,
            peak_flops=1e12,
        )

    monkeypatch.setattr(module, "estimate", estimate)
    return tried


GIB = 2**30


def test_the_memory_is_filled_in_few_compilations(monkeypatch, experiment, topology):
    # 1000 examples fit without recomputing: (16 - 1) GiB / 15.36 MiB. 4000 with.
    slope = 15.36 * 2**20
    tried = compiler(
        monkeypatch,
        fixed=GIB,
        slopes={False: slope, True: slope / 4},
        seconds={False: 1.0, True: 1.3},
    )
    found = module.search(experiment, topology)
    # Without recomputing it is faster, though the batch is smaller.
    assert not found.remat
    assert found.optimized
    assert 1000 / 1.07 <= found.batch_size <= 1000
    assert found.batch_size % 8 == 0
    assert len(tried) <= 10


def test_what_only_fits_when_recomputed(monkeypatch, experiment, topology):
    compiler(
        monkeypatch,
        fixed=GIB,
        slopes={False: 4 * GIB, True: GIB / 4},
        seconds={False: 1.0, True: 1.3},
    )
    found = module.search(experiment, topology, optimized=False)
    assert found.remat
    assert found.batch_size == 56  # 60 would fill it, in multiples of 8
    assert not found.optimized


def test_a_batch_that_is_too_large_to_begin_with(monkeypatch, experiment, topology):
    mixture = dataclasses.replace(experiment.mixture, batch_size=4096)
    experiment = dataclasses.replace(experiment, mixture=mixture)
    slopes = dict.fromkeys((False, True), GIB / 10)
    seconds = dict.fromkeys((False, True), 1.0)
    tried = compiler(monkeypatch, fixed=GIB, slopes=slopes, seconds=seconds)
    found = module.search(experiment, topology, optimized=False)
    assert 150 / 1.07 - 8 <= found.batch_size <= 150
    assert len(tried) <= 24


def test_nothing_fits(monkeypatch, experiment, topology):
    slopes = dict.fromkeys((False, True), GIB)
    seconds = dict.fromkeys((False, True), 1.0)
    compiler(monkeypatch, fixed=20 * GIB, slopes=slopes, seconds=seconds)
    with pytest.raises(OutOfMemoryError, match="does not fit"):
        module.search(experiment, topology)
