"""What TensorBoard itself reads of lines that are made by hand."""

import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_jax.train.metric_values import cosine_picture, split_by_shape
from mtl_jax.train.tensorboard import TensorBoard, next_file, record

LOADS = [0.5, 0.25, 0.25, 0.0]
LINE = {
    "all/cosine": [[1.0, -0.5], [-0.5, None]],
    "all/loss": 1.5,
    "digit/expert_load/block_1": LOADS,
    "digit/loss": None,
    "<b>left</b>/loss": 2,
}


def write(folder, steps, evaluated=True, **line):
    with TensorBoard(folder, ("digit", "<b>left</b>")) as board:
        for step in steps:
            board.update(step, LINE | line, {"step": step}, evaluated)


def read(folder):
    events = EventAccumulator(str(folder), dict.fromkeys(("images", "histograms"), 0))
    events.Reload()
    return events


def test_a_number_that_is_not_finite_is_shown_as_such(tmp_path):
    write(tmp_path, [7])
    events = read(tmp_path)
    (event,) = events.Scalars("digit/loss")
    assert event.step == 7
    assert np.isnan(event.value)
    (event,) = events.Scalars("<b>left</b>/loss")
    assert event.value == 2.0


def test_experts_are_the_bars_of_a_histogram(tmp_path):
    write(tmp_path, [1])
    (event,) = read(tmp_path).Histograms("digit/expert_load/block_1")
    histogram = event.histogram_value
    assert histogram.min == 0.0
    assert list(histogram.bucket_limit) == [1.0, 2.0, 3.0, 4.0]
    assert list(histogram.bucket) == LOADS
    assert histogram.num == 1.0
    # Half of the mass around 0.5, a quarter around 1.5 and around 2.5 each.
    assert histogram.sum == 0.25 + 0.375 + 0.625
    assert histogram.sum_squares == 0.125 + 0.5625 + 1.5625


def test_arrays_come_with_evaluations_alone(tmp_path):
    write(tmp_path, [1, 2], evaluated=False)
    tags = read(tmp_path).Tags()
    assert tags["histograms"] == tags["images"] == []
    assert len(tags["scalars"]) == 3


def test_cosines_are_a_picture(tmp_path):
    write(tmp_path, [1])
    (event,) = read(tmp_path).Images("all/cosine")
    (tmp_path / "cosine.png").write_bytes(event.encoded_image_string)
    with Image.open(tmp_path / "cosine.png") as picture:
        assert picture.size == (event.width, event.height)


def test_colours_of_cosines():
    """Pixels near the corner of each cell, which no number covers."""
    cosines = np.array([[1.0, -1.0], [0.0, np.nan]])
    picture = cosine_picture(cosines, ("a", "b"))
    right, bottom = picture.size
    x = [right - 8 - 32 * (2 - column) + 3 for column in range(2)]
    y = [bottom - 8 - 32 * (2 - row) + 3 for row in range(2)]
    pixels = [[picture.getpixel((x[j], y[i])) for j in range(2)] for i in range(2)]
    assert pixels == [[(0, 114, 178), (213, 94, 0)], [(255,) * 3, (200,) * 3]]


def test_values_are_sorted_by_their_shape():
    scalars, vectors, matrices = split_by_shape(LINE)
    assert set(scalars) == {"all/loss", "digit/loss", "<b>left</b>/loss"}
    assert set(vectors) == {"digit/expert_load/block_1"}
    np.testing.assert_array_equal(matrices["all/cosine"], [[1, -0.5], [-0.5, np.nan]])


def test_parts_of_a_run_within_a_second(tmp_path):
    """What the last part says of a step is what holds, however fast they follow."""
    for part, steps in enumerate([range(1, 8), range(5, 7), range(3, 5)]):
        write(tmp_path, steps, **{"all/loss": float(part)})
    points = [(e.step, e.value) for e in read(tmp_path).Scalars("all/loss")]
    assert points == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0)]
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == len(set(names)) == 3


def test_a_clock_that_goes_back_does_not_reorder_files(tmp_path):
    first = next_file(tmp_path, 2e9)
    first.touch()
    second = next_file(tmp_path, 1e9)
    assert second.name.startswith("events.out.tfevents.2000000001.")
    (tmp_path / "events.out.tfevents.of-somebody-else").touch()
    assert next_file(tmp_path, 3e9).name.startswith("events.out.tfevents.3000000000.")


def test_a_record_by_hand():
    """CRC-32C of "123456789" is e3069283, as its catalogue says."""
    rotated = ((0xE3069283 >> 15) | (0xE3069283 << 17)) & 0xFFFFFFFF
    masked = (rotated + 0xA282EAD8) & 0xFFFFFFFF
    written = record(b"123456789")
    assert written[:8] == struct.pack("<Q", 9)
    assert written[12:] == b"123456789" + struct.pack("<I", masked)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mtl_jax.train.tensorboard import TensorBoard

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with TensorBoard(Path(sys.argv[1]), ()) as board:
    board.update(1, {"all/loss": 1.0}, {}, False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    for step in range(2, 100):
        board.update(step, {"all/loss": 1.0}, {}, False)
"""


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("\n") == 1
    assert "nothing more is logged there, and the run goes on" in done.stderr
    steps = [event.step for event in read(tmp_path).Scalars("all/loss")]
    assert steps
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: None])
def test_a_folder_that_cannot_be_made(tmp_path, capsys, make):
    parent = tmp_path / "run"
    make(parent)
    write(parent / "tensorboard", [1, 2])
    assert capsys.readouterr().err.count("\n") == 1
    assert not parent.is_dir()
