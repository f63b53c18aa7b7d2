"""Pairs of digits: made as documented, from their own split alone."""

import numpy as np
import pytest

from mtl_jax.data.sources.digits import load_digits
from mtl_jax.data.sources.multi_digits import MultiDigits, overlay, shrink


def test_sizes_and_fields():
    assert len(MultiDigits("train")) == 16_000
    source = MultiDigits("test")
    assert len(source) == 2000
    for name, field in source.fields.items():
        assert isinstance(source[0][name], np.ndarray)
        assert source[0][name].shape == field.shape
        assert source[0][name].dtype == field.dtype
        assert not source[0][name].flags.writeable


def test_a_smaller_source_begins_like_a_larger_one():
    small, large = MultiDigits("train", size=10), MultiDigits("train", size=40)
    assert len(small) == 10
    for index in range(10):
        for name in small.fields:
            np.testing.assert_array_equal(small[index][name], large[index][name])


def test_overlay_takes_the_brighter_pixel():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 256, (2, 1, 28, 28), np.uint8)
    canvas = overlay(left, right)[0]
    for row in range(36):
        for column in range(36):
            there = [0]
            if row < 28 and column < 28:
                there.append(left[0, row, column])
            if row >= 8 and column >= 8:
                there.append(right[0, row - 8, column - 8])
            assert canvas[row, column] == max(there)


def test_shrink_is_the_mean_over_the_area():
    # 252 is a multiple of 28 and of 36: there the area is a whole number of pixels.
    canvas = np.random.default_rng(0).integers(0, 256, (3, 36, 36), np.uint8)
    fine = canvas.astype(np.int64).repeat(7, axis=1).repeat(7, axis=2)
    total = fine.reshape(3, 28, 9, 28, 9).sum((2, 4))
    np.testing.assert_array_equal(shrink(canvas), (2 * total + 81) // 162)


@pytest.mark.parametrize("index", [0, 777, 1999])
def test_both_digits_are_images_of_the_same_split(index):
    images, digits = load_digits("test")
    images = images[..., 0]
    black = np.zeros_like(images)
    record = MultiDigits("test")[index]
    mixed = record["image"][..., 0]

    # The first six rows and columns show the left image alone, the last six the right.
    def candidates(alone, edge):
        below = (alone <= mixed).all((1, 2))
        equal_rows = (alone[:, edge] == mixed[edge]).all((1, 2))
        equal_columns = (alone[:, :, edge] == mixed[:, edge]).all((1, 2))
        return np.flatnonzero(below & equal_rows & equal_columns)

    lefts = candidates(shrink(overlay(images, black)), slice(0, 6))
    rights = candidates(shrink(overlay(black, images)), slice(22, 28))
    pairs = [
        (left, right)
        for left in lefts
        for right in rights
        if (shrink(overlay(images[[left]], images[[right]]))[0] == mixed).all()
    ]
    ((left, right),) = pairs
    assert digits[left] == record["left"]
    assert digits[right] == record["right"]


def test_all_digits_appear_on_both_sides():
    source = MultiDigits("train")
    for side in ("left", "right"):
        counts = np.bincount([int(record[side]) for record in source], minlength=10)
        assert counts.min() > 1200  # 16,000 / 10, less the uneven classes


def test_mistakes_are_errors():
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        MultiDigits("dev")
    for size in (0, -1, 10**12):
        with pytest.raises(ValueError, match=f"size is {size}; give a number of pairs"):
            MultiDigits("train", size=size)
