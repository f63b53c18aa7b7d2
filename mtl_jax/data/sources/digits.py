"""Ten thousand handwritten digits of MNIST, split 8,000 to 2,000."""

import dataclasses
import functools
import types

import numpy as np
from jaxtyping import Int, UInt8

from mtl_jax.data.arrays import load_arrays
from mtl_jax.data.source import Field, Record
from mtl_jax.data.sources import check_split

COUNT, TEST_COUNT = 10_000, 2_000
SIZE = 28
DIGIT_NAMES = tuple("0123456789")

FIELDS = types.MappingProxyType(
    {
        "image": Field((SIZE, SIZE, 1), "uint8"),
        "digit": Field((), "int32", 10, DIGIT_NAMES),
    }
)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Handwritten digits and their classes.

    Fields:
      image: uint8 [28, 28, 1], white on black.
      digit: int32 [], 0..9.

    Records are read-only views.

    Attributes:
      split: ``"train"`` (8,000 images) or ``"test"`` (2,000 images).

    Raises:
      ValueError: If the split is unknown, or the data file missing or damaged.
    """

    split: str

    def __post_init__(self):
        check_split(self.split)
        load_digits(self.split)

    @property
    def fields(self) -> types.MappingProxyType[str, Field]:
        """The image and its digit."""
        return FIELDS

    def __len__(self) -> int:
        return len(load_digits(self.split)[1])

    def __getitem__(self, index: int) -> Record:
        images, digits = load_digits(self.split)
        return {"image": images[index], "digit": digits[index, ...]}


@functools.cache
def load_digits(
    split: str,
) -> tuple[UInt8[np.ndarray, "images 28 28 1"], Int[np.ndarray, " images"]]:
    """Loads the read-only images and digits (int32) of one split, in a fixed order."""
    arrays = load_arrays(
        "digits.npz", {"image": (COUNT, SIZE, SIZE), "digit": (COUNT,)}
    )
    order = np.array(split_order(arrays["image"]))
    chosen = order[:TEST_COUNT] if split == "test" else order[TEST_COUNT:]
    images = arrays["image"][chosen][..., None]
    digits = arrays["digit"][chosen].astype(np.int32)
    images.setflags(write=False)
    digits.setflags(write=False)
    return images, digits


def split_order(images: UInt8[np.ndarray, "images 28 28"]) -> list[int]:
    """The order of the images: the first 2,000 are for the test.

    It is a fixed shuffle, but images that equal another one in black and white come
    last: they all go to the training split, so that none has its double in the test.

    Returns:
      All indices of the images.
    """
    # A bit generator's stream is fixed for good, unlike `Generator.permutation`.
    shuffled = np.argsort(np.random.PCG64(0).random_raw(len(images)))
    shapes = [image.tobytes() for image in np.packbits(images > 127, axis=-1)]
    counts: dict[bytes, int] = {}
    for shape in shapes:
        counts[shape] = counts.get(shape, 0) + 1
    return sorted(shuffled.tolist(), key=lambda index: counts[shapes[index]] > 1)
