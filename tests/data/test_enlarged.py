import dataclasses

import numpy as np
import pytest

from mtl_jax.data.source import Field
from mtl_jax.data.sources.digits import Digits
from mtl_jax.data.sources.earth import Earth
from mtl_jax.data.sources.enlarged import Enlarged


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One record of 2 x 1 pixels, a value for each of them and one for all."""

    @property
    def fields(self):
        return {
            "image": Field((2, 1, 3), "uint8"),
            "depth": Field((2, 1), "float32"),
            "kind": Field((), "int32", 4),
        }

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {
            "image": np.array([[[1, 2, 3]], [[4, 5, 6]]], np.uint8),
            "depth": np.array([[0.5], [np.nan]], np.float32),
            "kind": np.array(3, np.int32),
        }


def test_pixels_are_repeated_and_all_else_stays():
    record = Enlarged(Tiny(), 2)[0]
    one, four = [1, 2, 3], [4, 5, 6]
    expected = [[one, one], [one, one], [four, four], [four, four]]
    np.testing.assert_array_equal(record["image"], expected)
    np.testing.assert_array_equal(
        record["depth"], [[0.5, 0.5], [0.5, 0.5], [np.nan, np.nan], [np.nan, np.nan]]
    )
    assert record["kind"] == 3


@pytest.mark.parametrize("source", [Earth("test"), Digits("test")])
def test_fields_describe_the_records(source):
    enlarged = Enlarged(source, 3)
    assert len(enlarged) == len(source)
    record = enlarged[len(source) - 1]
    assert set(record) == set(enlarged.fields)
    for name, field in enlarged.fields.items():
        assert record[name].shape == field.shape
        assert record[name].dtype == field.dtype
        assert field.num_classes == source.fields[name].num_classes
    assert enlarged.fields["image"].shape[0] == 3 * source.fields["image"].shape[0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="factor is 0"):
        Enlarged(Tiny(), 0)
    with pytest.raises(ValueError, match=r"image_field is 'picture'.*depth"):
        Enlarged(Tiny(), 2, "picture")
