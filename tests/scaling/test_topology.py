"""Slices that are not there: names, devices, and what cannot be."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys

import jax
import pytest

from mtl_jax.scaling import make_topology, prepare_environment

needs_libtpu = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="libtpu is made for Linux on x86-64 alone",
)


@pytest.fixture(scope="module", autouse=True)
def environment():
    prepare_environment()


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("v4:2x2x1", 4, 4),
        ("v5e:1x1", 1, 1),
        ("v5e:2x4", 8, 8),
        ("v5p:4x4x4", 64, 64),
        ("v6e:2x2", 4, 4),
        ("tpu7x:2x2x1", 4, 8),
    ],
)
def test_slices(name, chips, devices):
    topology = make_topology(name)
    assert topology.num_chips == chips
    assert len(topology.devices) == devices
    assert {device.platform for device in topology.devices} == {"tpu"}
    sides = [max(d.coords[i] for d in topology.devices) + 1 for i in range(3)]
    assert tuple(sides) == topology.shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "unknown; give one of v4, v5e"),
        ("v5e", "unknown"),
        ("v5e:2xtwo", "unknown"),
        ("v5e:2x2x2", "has 3 sides, but v5e has 2"),
        ("v5e:32x32", "does not exist: v5e slices have 1 to 16 chips along a side"),
        ("v5e:0x4", "does not exist"),
        ("v5p:32x32x32", "at most 6,144 in all"),
    ],
)
def test_slices_there_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        make_topology(name)


@needs_libtpu
def test_a_slice_that_the_compiler_refuses():
    with pytest.raises(ValueError, match=r"cannot be made.*choose sides that are even"):
        make_topology("v5e:3x5")


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; .* mtl_jax\[tpu\]"):
        make_topology("v5e:4x8")


@needs_libtpu
def test_another_libtpu_than_jax_is_made_for_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1.2")
    remedy = re.escape(f"pip install 'jax[tpu]=={jax.__version__}'")
    with pytest.raises(ValueError, match=f"libtpu 0.0.1.2 is installed.*{remedy}"):
        make_topology("v5e:4x8")


def test_jax_stays_on_the_cpu():
    assert jax.devices()[0].platform == "cpu"
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
