"""Tiles of the Earth from space with surface, climate, elevation and slope.

The globe between 74.67° N and 74.67° S is a grid of square pixels of 8 arc minutes,
1120 x 2700 of them. A tile is 32 x 32 pixels; tiles begin at every 16th pixel, reach no
further than column 2688 (so that none meets another across 180°) and hold at least 20 %
land. The rest is ocean, which would drown the tasks.

Tiles are split by place. Blocks of 112 x 112 pixels (14.9°) divide the globe into 10
rows and 24 columns; the 20 blocks whose ``(column + 7 row) mod 12`` is 2, two in each
row and on opposite sides of the globe, are for the test. Of the twelve such patterns,
among those with 200 test tiles, this one comes nearest to the climates of all land.
Test tiles lie inside these blocks, training tiles neither overlap nor border them, and
tiles across an edge are dropped.
"""

import dataclasses
import functools
import types

import numpy as np
from jaxtyping import Float

from mtl_jax.data.arrays import load_arrays
from mtl_jax.data.source import Field, Record
from mtl_jax.data.sources import check_split

TILE = 32
STRIDE = 16
BLOCK = 112
MIN_LAND = 0.2

ROWS, COLUMNS, COLUMNS_TILED = 1120, 2700, 2688
PIXEL_DEGREES = 8 / 60
PIXEL_KILOMETRES = 8 * 1.852  # an arc minute of latitude is a nautical mile

FIELDS = types.MappingProxyType(
    {
        "image": Field((TILE, TILE, 3), "uint8"),
        "surface": Field((TILE, TILE), "int32", 2, ("ocean", "land")),
        "climate": Field(
            (TILE, TILE),
            "int32",
            5,
            ("tropical", "arid", "temperate", "continental", "polar"),
        ),
        "elevation": Field((TILE, TILE), "float32"),
        "log_slope": Field((TILE, TILE), "float32"),
    }
)


@dataclasses.dataclass(frozen=True)
class Earth:
    """32 x 32 tiles of NASA's Blue Marble with four dense targets.

    Fields:
      image: uint8 [32, 32, 3], RGB.
      surface: int32 [32, 32], 0 ocean, 1 land. Lakes are land.
      climate: int32 [32, 32], Köppen's main groups A..E as 0..4; -1 on the ocean.
      elevation: float32 [32, 32], ``sign(z) sqrt(|z|) / 30`` of the height z in metres,
        the sea floor's below 0. 900 m is 1.
      log_slope: float32 [32, 32], ``log(1 + s) - 1.5`` of the slope s in metres a
        kilometre, measured over two pixels (30 km).

    Records are read-only views.

    Attributes:
      split: ``"train"`` (3,273 tiles) or ``"test"`` (315 tiles).

    Raises:
      ValueError: If the split is unknown, or the data file missing or damaged.
    """

    split: str

    def __post_init__(self):
        check_split(self.split)
        load_rasters()

    @property
    def fields(self) -> types.MappingProxyType[str, Field]:
        """The image and the four targets."""
        return FIELDS

    def __len__(self) -> int:
        return len(tile_origins(self.split))

    def __getitem__(self, index: int) -> Record:
        row, column = tile_origins(self.split)[index]
        return {
            name: raster[row : row + TILE, column : column + TILE]
            for name, raster in load_rasters().items()
        }


@functools.cache
def load_rasters() -> dict[str, np.ndarray]:
    """Loads the globe: field name -> read-only raster [1120, 2700, ...]."""
    globe = (ROWS, COLUMNS)
    arrays = load_arrays(
        "earth.npz",
        {
            "image_delta": (*globe, 3),
            "land": globe,
            "climate": globe,
            "elevation_delta": globe,
        },
    )
    # The file holds differences from west to east, modulo 256 and 65536.
    image = np.cumsum(arrays["image_delta"], axis=1, dtype=np.uint8)
    metres = np.cumsum(arrays["elevation_delta"], axis=1, dtype=np.int16)
    metres = metres.astype(np.float32)
    rasters = {
        "image": image,
        "surface": arrays["land"].astype(np.int32),
        "climate": arrays["climate"].astype(np.int32),
        "elevation": np.sign(metres) * np.sqrt(np.abs(metres)) / np.float32(30),
        "log_slope": np.log1p(slope(metres)) - np.float32(1.5),
    }
    for raster in rasters.values():
        raster.setflags(write=False)
    return rasters


def slope(
    metres: Float[np.ndarray, "rows columns"],
) -> Float[np.ndarray, "rows columns"]:
    """Steepness of the globe by central differences, in metres a kilometre.

    Args:
      metres: Elevation; columns go around the globe and wrap.

    Returns:
      float32, same shape. A pixel's width shrinks with the cosine of its latitude.
    """
    rows_from_equator = np.arange(len(metres)) + 0.5 - len(metres) / 2
    shrink = np.cos(np.radians(rows_from_equator * PIXEL_DEGREES)).astype(np.float32)
    southward = np.gradient(metres, axis=0)
    eastward = (np.roll(metres, -1, axis=1) - np.roll(metres, 1, axis=1)) / 2
    eastward = eastward / shrink[:, None]
    return np.hypot(southward, eastward) / np.float32(PIXEL_KILOMETRES)


@functools.cache
def tile_origins(split: str) -> tuple[tuple[int, int], ...]:
    """The row and column of the north-west pixel of each tile of a split."""
    land = load_rasters()["surface"]
    in_split = is_test_tile if split == "test" else is_train_tile
    return tuple(
        (row, column)
        for row in range(0, ROWS - TILE + 1, STRIDE)
        for column in range(0, COLUMNS_TILED - TILE + 1, STRIDE)
        if in_split(row, column)
        and land[row : row + TILE, column : column + TILE].mean() >= MIN_LAND
    )


def is_test_tile(row: int, column: int) -> bool:
    """Whether the tile lies in a test block."""
    return all(is_test_block(*block) for block in blocks_of(row, column, margin=0))


def is_train_tile(row: int, column: int) -> bool:
    """Whether the tile and the rim of pixels around it lie outside all test blocks."""
    return not any(is_test_block(*block) for block in blocks_of(row, column, margin=1))


def is_test_block(block_row: int, block_column: int) -> bool:
    """Whether a block is for the test. No two such blocks touch."""
    return (block_column + 7 * block_row) % 12 == 2


def blocks_of(row: int, column: int, margin: int) -> set[tuple[int, int]]:
    """The blocks under the corners of a tile with a margin around it.

    A tile is smaller than a block: the blocks under its corners are all it meets.
    """
    end = TILE - 1 + margin
    rows = max(row - margin, 0), min(row + end, ROWS - 1)
    columns = column - margin, column + end
    return {(r // BLOCK, c // BLOCK) for r in rows for c in columns}
