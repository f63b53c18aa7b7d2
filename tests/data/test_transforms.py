import itertools

import numpy as np
import pytest

from mtl_jax.data import dihedral, random_shift

SQUARE = np.arange(16).reshape(4, 4)


def symmetries():
    """The symmetries of the square as index maps: flips of rows, columns, diagonal."""
    for rows, columns, swap in itertools.product((1, -1), (1, -1), (False, True)):
        turned = SQUARE[::rows, ::columns]
        yield turned.T if swap else turned


def test_dihedral_reaches_the_eight_symmetries_and_nothing_else():
    rng = np.random.default_rng(0)
    drawn = {dihedral({"a": SQUARE}, rng)["a"].tobytes() for _ in range(200)}
    assert drawn == {symmetry.tobytes() for symmetry in symmetries()}
    assert len(drawn) == 8


def test_dihedral_moves_every_field_alike():
    record = {
        "image": np.stack([SQUARE, SQUARE + 100, SQUARE + 200], axis=-1),
        "surface": SQUARE.astype(np.int32),
        "elevation": SQUARE.astype(np.float32),
    }
    rng = np.random.default_rng(1)
    for _ in range(20):
        moved = dihedral(record, rng)
        np.testing.assert_array_equal(moved["image"][..., 0], moved["surface"])
        np.testing.assert_array_equal(moved["image"][..., 2], moved["surface"] + 200)
        np.testing.assert_array_equal(moved["elevation"], moved["surface"])
        assert moved["elevation"].dtype == np.float32


def shifted(image, row, column):
    """``image`` moved down and right, pixel by pixel, with zeros moved in."""
    height, width = image.shape[:2]
    result = np.zeros_like(image)
    for r, c in np.ndindex(height, width):
        if 0 <= r - row < height and 0 <= c - column < width:
            result[r, c] = image[r - row, c - column]
    return result


@pytest.mark.parametrize("max_shift", [0, 1, 2])
def test_random_shift_reaches_every_shift_and_nothing_else(max_shift):
    image = np.arange(1, 31, dtype=np.uint8).reshape(5, 6, 1)
    rng = np.random.default_rng(0)
    drawn = set()
    for _ in range(300):
        record = random_shift({"image": image, "digit": np.int32(4)}, rng, max_shift)
        assert record["digit"] == 4
        assert record["image"].shape == image.shape
        assert record["image"].dtype == np.uint8
        drawn.add(record["image"].tobytes())
    steps = range(-max_shift, max_shift + 1)
    expected = {shifted(image, r, c).tobytes() for r in steps for c in steps}
    assert drawn == expected


@pytest.mark.parametrize("max_shift", [-1, 5, 10**9])
def test_a_shift_that_leaves_no_image_is_refused(max_shift):
    record, rng = {"image": np.zeros((5, 6, 1), np.uint8)}, np.random.default_rng(0)
    with pytest.raises(ValueError, match=f"max_shift is {max_shift}; .*, 5x6 pixels"):
        random_shift(record, rng, max_shift)


def test_a_shift_needs_an_image():
    with pytest.raises(ValueError, match=r"the field 'image', but has \['photo'\]"):
        random_shift({"photo": np.zeros((5, 6, 1))}, np.random.default_rng(0))


@pytest.mark.parametrize("transform", [dihedral, random_shift])
def test_transforms_leave_their_input_alone_and_follow_the_generator(transform):
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5, 1)
    image.setflags(write=False)
    draws = [
        [transform({"image": image}, rng)["image"] for _ in range(5)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    ]
    np.testing.assert_array_equal(*draws)
