"""Tiles of the Earth: the split is safe, the targets are true."""

import numpy as np
import pytest

from mtl_jax.data.arrays import FOLDER
from mtl_jax.data.sources.earth import Earth, slope, tile_origins

TILE = 32
GLOBE_COLUMNS = 2700


@pytest.fixture(scope="module")
def train():
    return Earth("train")


@pytest.fixture(scope="module")
def test():
    return Earth("test")


def sample(source, step):
    return [source[index] for index in range(0, len(source), step)]


def test_sizes(train, test):
    assert len(train) == 3273
    assert len(test) == 315


def test_records_are_as_the_fields_say(test):
    for record in sample(test, 20):
        assert record.keys() == test.fields.keys()
        for name, field in test.fields.items():
            assert record[name].shape == field.shape
            assert record[name].dtype == field.dtype
            assert not record[name].flags.writeable


def test_iteration_ends(test):
    assert sum(1 for _ in test) == 315


def test_no_test_tile_overlaps_or_touches_a_training_tile():
    train_row, train_column = np.array(tile_origins("train")).T
    test_row, test_column = np.array(tile_origins("test")).T
    row_distance = np.abs(train_row[:, None] - test_row[None, :])
    column_distance = np.abs(train_column[:, None] - test_column[None, :])
    # The globe is round: the last column is the neighbour of the first.
    column_distance = np.minimum(column_distance, GLOBE_COLUMNS - column_distance)
    # At a distance of 32 two tiles share an edge or a corner.
    touch = (row_distance <= TILE) & (column_distance <= TILE)
    assert touch.shape == (3273, 315)
    assert not touch.any()


def test_test_tiles_lie_all_around_the_globe():
    row, column = np.array(tile_origins("test")).T
    quarters = np.bincount(4 * column // GLOBE_COLUMNS, minlength=4)
    assert quarters.min() >= 30
    north, south = (row < 560).sum(), (row >= 560).sum()
    assert min(north, south) >= 60
    # By area: the pixels that any test tile covers, of those that any tile covers.
    covered = {}
    for split in ("train", "test"):
        mask = np.zeros((1120, GLOBE_COLUMNS), bool)
        for r, c in tile_origins(split):
            mask[r : r + TILE, c : c + TILE] = True
        covered[split] = mask.sum()
    assert 0.07 <= covered["test"] / sum(covered.values()) <= 0.11


def test_tiles_hold_land(train, test):
    for source in (train, test):
        assert min(r["surface"].mean() for r in sample(source, 7)) >= 0.2


def test_every_climate_is_in_both_splits(train, test):
    for source in (train, test):
        climates = np.stack([r["climate"] for r in sample(source, 3)])
        shares = np.bincount(climates[climates >= 0], minlength=5) / climates.size
        assert shares.min() > 0.04


def test_climate_is_labelled_on_land_alone(train):
    surface = np.stack([r["surface"] for r in sample(train, 3)])
    climate = np.stack([r["climate"] for r in sample(train, 3)])
    assert np.isin(surface, (0, 1)).all()
    assert (climate[surface == 0] == -1).all()
    assert (climate[surface == 1] >= 0).mean() > 0.995
    assert climate.max() == 4


def record_at(latitude, longitude):
    """The record of a tile around a place, and the place's pixel in it."""
    row = int((74 + 2 / 3 - latitude) * 7.5)
    column = int((longitude + 180) * 7.5)
    for split in ("train", "test"):
        for index, (top, left) in enumerate(tile_origins(split)):
            if top <= row < top + TILE and left <= column < left + TILE:
                return Earth(split)[index], (row - top, column - left)
    raise AssertionError("no tile there")


@pytest.mark.parametrize(
    ("latitude", "longitude", "surface", "climate"),
    [
        (-3.1, -60.0, "land", "tropical"),  # Manaus
        (23.0, 10.0, "land", "arid"),  # the Sahara
        (52.2, 0.1, "land", "temperate"),  # Cambridge
        (55.7, 37.6, "land", "continental"),  # Moscow
        (72.0, -40.0, "land", "polar"),  # Greenland
        (-33.0, 151.0, "land", "temperate"),  # north of Sydney
        (42.0, 5.0, "ocean", None),  # the Gulf of Lion
    ],
)
def test_places_are_where_they_are(latitude, longitude, surface, climate, test):
    record, pixel = record_at(latitude, longitude)
    names = test.fields["surface"].class_names
    assert names[record["surface"][pixel]] == surface
    group = record["climate"][pixel]
    assert climate == (
        test.fields["climate"].class_names[group] if group >= 0 else None
    )


def test_colours_are_right():
    desert, pixel = record_at(23.0, 10.0)
    red, green, blue = desert["image"][pixel].astype(int)
    assert red > green > blue > 50
    forest, pixel = record_at(-3.5, -65.0)
    red, green, blue = forest["image"][pixel].astype(int)
    assert green > max(red, blue)


@pytest.mark.parametrize(
    ("latitude", "longitude", "metres", "tolerance"),
    [
        (33.0, 88.0, 5000, 500),  # the Tibetan plateau
        (52.5, 5.5, 0, 30),  # Flevoland
        (43.0, 34.0, -2200, 200),  # the floor of the Black Sea
        (39.7, -105.0, 1610, 150),  # Denver
    ],
)
def test_elevations_are_known_ones(latitude, longitude, metres, tolerance):
    record, pixel = record_at(latitude, longitude)
    value = record["elevation"][pixel].astype(np.float64)
    assert abs(np.sign(value) * (30 * value) ** 2 - metres) <= tolerance


def test_elevation_is_the_signed_root_of_whole_metres(test):
    with np.load(FOLDER / "earth.npz", allow_pickle=False) as file:
        metres = np.cumsum(file["elevation_delta"].astype(np.int64), axis=1)
    metres = (metres + 2**15) % 2**16 - 2**15
    for index in range(0, len(test), 30):
        row, column = tile_origins("test")[index]
        z = metres[row : row + TILE, column : column + TILE].astype(np.float64)
        expected = np.sign(z) * np.sqrt(np.abs(z)) / 30
        np.testing.assert_allclose(test[index]["elevation"], expected, rtol=1e-6)


def test_log_slope_follows_from_the_elevation(test):
    # By hand for the inner pixels of a tile, from its own elevation.
    for index in (5, 160, 310):
        record, (top, _) = test[index], tile_origins("test")[index]
        root = record["elevation"].astype(np.float64)
        z = np.sign(root) * (30 * root) ** 2
        for row, column in ((1, 1), (9, 20), (30, 30)):
            latitude = 74 + 2 / 3 - (top + row + 0.5) * 8 / 60
            north_south = 8 * 1.852
            east_west = north_south * np.cos(np.deg2rad(latitude))
            dy = (z[row + 1, column] - z[row - 1, column]) / (2 * north_south)
            dx = (z[row, column + 1] - z[row, column - 1]) / (2 * east_west)
            expected = np.log(1 + np.sqrt(dx**2 + dy**2)) - 1.5
            np.testing.assert_allclose(
                record["log_slope"][row, column], expected, rtol=1e-4, atol=1e-4
            )


def test_slope_of_planes():
    rows, columns = np.meshgrid(np.arange(1120.0), np.arange(60.0), indexing="ij")
    # 14.816 m a pixel southward, of 14.816 km: 1 m/km.
    southward = slope((14.816 * rows).astype(np.float32))
    np.testing.assert_allclose(southward, 1, rtol=1e-4)
    # Eastward a pixel is half as wide at 60°, row (74 2/3 - 60) * 7.5 = 110.
    eastward = slope((14.816 * columns).astype(np.float32))[:, 1:-1]
    np.testing.assert_allclose(eastward[559:561], 1, rtol=1e-4)
    np.testing.assert_allclose((eastward[109] + eastward[110]) / 2, 2, rtol=1e-4)


def test_targets_are_of_order_one(train):
    for name in ("elevation", "log_slope"):
        values = np.stack([r[name] for r in sample(train, 7)])
        assert np.isfinite(values).all()
        assert abs(values.mean()) < 0.7
        assert 0.5 < values.std() < 1.3


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="split 'validation' is unknown; choose one"):
        Earth("validation")
