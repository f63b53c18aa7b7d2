"""Digits: the split is clean and fixed, the labels are right."""

import numpy as np
import pytest

from mtl_jax.data.sources.digits import Digits, split_order


def stacked(split):
    source = Digits(split)
    records = [source[index] for index in range(len(source))]
    return (
        np.stack([record["image"] for record in records]),
        np.stack([record["digit"] for record in records]),
    )


def test_records_are_as_the_fields_say():
    source = Digits("test")
    for name, field in source.fields.items():
        assert isinstance(source[0][name], np.ndarray)
        assert source[0][name].shape == field.shape
        assert source[0][name].dtype == field.dtype
        assert not source[0][name].flags.writeable


def test_splits_are_complete_and_share_no_image():
    train, test = stacked("train"), stacked("test")
    assert len(train[1]) == 8000
    assert len(test[1]) == 2000
    # The counts of the whole, as the package of the digits states them.
    np.testing.assert_array_equal(
        np.bincount(np.concatenate([train[1], test[1]])),
        [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978],
    )
    black_and_white = [
        {(image > 127).tobytes() for image in images} for images, _ in (train, test)
    ]
    assert black_and_white[0].isdisjoint(black_and_white[1])


def test_the_split_is_fixed():
    # Results are compared across versions: these must never change.
    source = Digits("test")
    first = [int(source[index]["digit"]) for index in range(12)]
    assert first == [6, 0, 0, 3, 0, 2, 9, 3, 2, 7, 3, 4]


def test_labels_fit_the_images():
    # The nearest class mean, a weak classifier, is right for four in five.
    (train_images, train_digits), (test_images, test_digits) = map(
        stacked, ("train", "test")
    )
    means = np.stack([train_images[train_digits == d].mean(0) for d in range(10)])
    distance = ((test_images[:, None] - means.astype(np.float32)) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == test_digits).mean() > 0.75


def test_doubles_go_to_the_training_split():
    images = np.random.default_rng(0).integers(0, 256, (2010, 28, 28), np.uint8)
    images[7] = images[1500]
    images[8] = images[3] // 128 * 255  # equal in black and white
    order = split_order(images)
    assert sorted(order) == list(range(2010))
    assert set(order[-4:]) == {3, 7, 8, 1500}


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="split 'valid' is unknown; choose one"):
        Digits("valid")
