"""Least times by hand, on slices whose links and rates are round numbers."""

import types

import numpy as np
import pytest

from mtl_jax.scaling.chips import Chip
from mtl_jax.scaling.collectives import Collective
from mtl_jax.scaling.roofline import (
    Roofline,
    Span,
    collective_seconds,
    group_spans,
    make_roofline,
)
from mtl_jax.scaling.topology import Topology

# 1 TFLOP/s, 100 GB/s of memory traffic, 10 GB/s each way of a link; a side closes to a
# ring at 4 chips.
FLAT = Chip("flat", 1e12, 2**30, 100e9, 10e9, 2, 1, 256, 16, 4)
CUBE = Chip("cube", 1e12, 2**30, 100e9, 10e9, 3, 1, 4096, 16, 4)
HALVES = Chip("halves", 1e12, 2**30, 100e9, 10e9, 3, 2, 4096, 16, 4)


def slice_of(chip, *sides):
    x, y, z = (*sides, 1, 1)[:3]
    devices = [
        types.SimpleNamespace(coords=[i, j, k])
        for k in range(z)
        for j in range(y)
        for i in range(x)
        for _ in range(chip.devices)
    ]
    return Topology("slice", chip, (x, y, z), devices)


def at(topology, *places):
    return [
        device for device in topology.devices if tuple(device.coords) in set(places)
    ]


def seconds(kind, size, topology, devices):
    collective = Collective(kind, size, 1, tuple(range(len(devices))), ("x",), False)
    return collective_seconds(collective, devices, topology)


def test_sides_close_to_rings_only_where_they_are_long_enough():
    assert slice_of(FLAT, 4, 2).wraps == (True, False, False)
    assert slice_of(CUBE, 4, 4, 8).wraps == (True, True, True)
    # No whole cubes of 4 x 4 x 4.
    assert slice_of(CUBE, 4, 4, 2).wraps == (False, False, False)


def test_groups_lie_along_sides_as_rings_rows_or_with_gaps():
    topology = slice_of(FLAT, 8, 2)
    row = [(i, 0, 0) for i in range(8)]
    assert group_spans(at(topology, *row), topology) == [Span(8, 2.0)]
    assert group_spans(at(topology, *row[:4]), topology) == [Span(4, 1.0)]
    # Every second one: a ring, whose links another group shares.
    assert group_spans(at(topology, *row[::2]), topology) == [Span(4, 1.0)]
    # 0 and 4: the ring's two halves.
    assert group_spans(at(topology, row[0], row[4]), topology) == [Span(2, 0.5)]
    whole = group_spans(topology.devices, topology)
    assert whole == [Span(8, 2.0), Span(2, 1.0)]
    # An L is no box: its longest side carries everything.
    crooked = at(topology, row[0], row[1], row[2], (0, 1, 0))
    assert group_spans(crooked, topology) == [Span(4, 1.0)]


# A ring of 4 with 20 GB/s into each chip. All but a quarter of 4 GB arrives: 3 / 20 s.
# A sum does that twice. All to all: the halves exchange 1 GB · 4 / 4 = 4 GB through the
# two places where the ring is cut, 2 · 10 GB/s: 0.2 s.
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 0.15),
        ("reduce-scatter", 0.15),
        ("all-reduce", 0.3),
        ("all-to-all", 0.2),
        ("collective-permute", 0.4),
    ],
)
def test_least_times_on_a_ring(kind, expected):
    topology = slice_of(FLAT, 4)
    assert seconds(kind, 4e9, topology, topology.devices) == pytest.approx(expected)


def test_least_times_on_a_row_and_on_two_sides():
    row = slice_of(FLAT, 2)
    # Half of 4 GB through one link: 0.2 s; 4 GB · 2 / 4 through one place: 0.2 s.
    assert seconds("all-gather", 4e9, row, row.devices) == pytest.approx(0.2)
    assert seconds("all-to-all", 4e9, row, row.devices) == pytest.approx(0.2)
    square = slice_of(FLAT, 4, 4)
    # 15/16 of 4 GB through four links each way.
    expected = 4e9 * 15 / 16 / 40e9
    assert seconds("all-gather", 4e9, square, square.devices) == pytest.approx(expected)
    # 4 GB · 16 / 4 = 16 GB through four rings cut twice: 80 GB/s.
    assert seconds("all-to-all", 4e9, square, square.devices) == pytest.approx(0.2)


def test_two_devices_of_a_chip_share_its_links():
    topology = slice_of(HALVES, 4, 4, 4)
    # 128 devices with 1 GB each are 64 chips with 2 GB: 32 GB cross 16 rings cut twice.
    assert seconds("all-to-all", 1e9, topology, topology.devices) == pytest.approx(0.1)
    # Those of one chip do not need the links between chips.
    pair = topology.devices[:2]
    assert group_spans(pair, topology) == []
    assert seconds("all-gather", 1e9, topology, pair) == pytest.approx(1 / 30)


def test_a_step_overlaps_what_it_can_and_adds_what_it_cannot():
    topology = slice_of(FLAT, 4)
    group = (0, 1, 2, 3)
    roofline = make_roofline(
        topology,
        np.array(topology.devices).reshape(1, 1, 4, 1),
        flops=0.5e12,
        memory_bytes=20e9,
        collectives=[
            Collective("all-gather", 4 * 10**9, 2, group, ("fsdp",), True),
            Collective("all-to-all", 4 * 10**9, 1, group, ("expert",), False),
            Collective("all-reduce", 4 * 10**9, 1, group, ("expert",), False),
        ],
    )
    assert roofline.compute == pytest.approx(0.5)
    assert roofline.memory == pytest.approx(0.2)
    assert roofline.overlapped == {"fsdp": pytest.approx(0.3)}
    assert roofline.exposed == {"expert": pytest.approx(0.5)}
    assert roofline.total == pytest.approx(0.5 + 0.5)
    assert roofline.interconnect == pytest.approx(0.8)
    assert roofline.bound == "interconnect"


@pytest.mark.parametrize(
    ("compute", "memory", "bound"), [(2.0, 1.0, "compute"), (1.0, 2.0, "memory")]
)
def test_the_bound_is_what_takes_longest(compute, memory, bound):
    roofline = Roofline(compute, memory, {"data": 0.5}, {})
    assert (roofline.total, roofline.bound) == (2.0, bound)
