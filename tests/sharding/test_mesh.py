import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from mtl_jax.sharding import make_mesh


def test_axes_are_named_ordered_and_automatic():
    mesh = make_mesh(data=2, expert=4)
    assert mesh.axis_names == ("data", "fsdp", "expert", "model")
    assert tuple(mesh.shape.values()) == (2, 1, 4, 1)
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"expert": 4}, (2, 1, 4, 1)),
        ({"data": 2, "fsdp": -1, "model": 2}, (2, 2, 1, 2)),
    ],
)
def test_one_size_is_inferred(sizes, shape):
    assert make_mesh(**sizes).devices.shape == shape


def test_only_the_given_devices_are_used():
    devices = jax.devices()[2:4]
    assert set(make_mesh(expert=2, devices=devices).devices.flat) == set(devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 3}, "data=-1, fsdp=1, expert=3, model=1 do not divide 8 devices"),
        ({"data": 2, "expert": 2}, "do not divide 8 devices: their product is 4"),
        ({"data": 16}, "their product is 16"),
        ({"expert": 16}, "do not divide 8 devices"),
        ({"expert": -1}, "more than one axis"),
        ({"model": 0}, "model=0 must be positive"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a slice that is not there."""

    id: int
    coords: tuple[int, ...]
    process_index: int = 0


def chips(*sides):
    places = itertools.product(*(range(side) for side in sides))
    return list(itertools.starmap(Chip, enumerate(places)))


def extent(devices):
    """Chips along each side of the box that holds a group."""
    places = np.array([device.coords for device in devices])
    return tuple(np.ptp(places, axis=0) + 1)


@pytest.mark.parametrize(
    ("sides", "sizes", "expert", "fsdp"),
    [
        ((16, 16, 16), {"expert": 8}, (2, 2, 2), (1, 1, 1)),
        ((8, 8, 8), {"expert": 8, "fsdp": 4}, (2, 2, 2), (7, 1, 1)),
        ((8, 8, 16), {"expert": 16}, (2, 2, 4), (1, 1, 1)),
        ((16, 16, 1), {"expert": 16}, (4, 4, 1), (1, 1, 1)),
        ((4, 4, 1), {"expert": 8}, (2, 4, 1), (1, 1, 1)),
    ],
)
def test_chips_that_share_experts_lie_close_together(sides, sizes, expert, fsdp):
    devices = chips(*sides)
    grid = make_mesh(devices=devices, **sizes).devices
    assert sorted(device.id for device in grid.flat) == list(range(len(devices)))
    for data, model in np.ndindex(grid.shape[0], grid.shape[3]):
        for row in grid[data, :, :, model]:
            assert extent(row) == expert
        for column in grid[data, :, :, model].T:
            assert extent(column) == fsdp
