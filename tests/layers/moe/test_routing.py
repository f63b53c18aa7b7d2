import numpy as np
import pytest

from mtl_jax.layers.moe.routing import largest

LOW = -np.inf


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, LOW, LOW, LOW], [0, 1, 2]),
        ([LOW, LOW, 0, -1e38], [2, 3, 0]),
        ([LOW, LOW, LOW, LOW], [0, 1, 2]),
    ],
)
def test_values_that_are_infinitely_low_are_each_taken_once(values, expected):
    np.testing.assert_array_equal(largest(np.float32(values), 3), expected)
