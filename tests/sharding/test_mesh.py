import jax
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
