"""What the figures are made of: bins, cosines, expert use, colours of tiles."""

import base64
import io
import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex

from mtl_jax.report.curves import binned, loss_panels, metric_panels
from mtl_jax.report.heat_maps import cosine_images, expert_images
from mtl_jax.report.run_folder import read_run
from mtl_jax.report.tiles import (
    UNLABELLED,
    class_colors,
    class_pixels,
    dense_tasks,
    labelled_images,
    value_pixels,
)


def decoded(image):
    png = base64.b64decode(image.source.removeprefix("data:image/png;base64,"))
    pixels = matplotlib.image.imread(io.BytesIO(png), format="png")
    return np.round(255 * pixels[..., :3]).astype(np.uint8)


def write_records(folder, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)


def test_binned_means_skip_what_is_absent():
    steps = np.arange(1, 7)
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan])
    centres, means = binned(steps, values, max_points=3)
    assert centres.tolist() == [2, 4, 6]
    np.testing.assert_array_equal(means, [2.0, 5.0, np.nan])
    assert binned(steps, values, max_points=6)[1] is values


def test_cosines_are_averaged_over_active_steps(make_run):
    folder = make_run("main", tasks=("surface", "digit"))
    write_records(
        folder,
        [
            {"step": 1, "all/cosine": [[1, -0.5], [-0.5, 1]]},
            {"step": 2, "all/cosine": [[None, None], [None, 1]]},
            {"step": 3, "all/cosine": [[1, 0.1], [0.1, 1]]},
        ],
    )
    mean, course = cosine_images(read_run(folder))
    assert "surface · digit -0.20" in mean.alt
    assert "1 pairs" in course.alt
    assert "steps 1 to 3" in course.alt


def test_cosines_of_one_step_of_inactive_tasks(make_run):
    folder = make_run("main", tasks=("surface", "digit"))
    write_records(folder, [{"step": 7, "all/cosine": [[None, None], [None, 1]]}])
    assert len(cosine_images(read_run(folder))) == 2


def test_cosines_need_two_tasks(make_run):
    assert cosine_images(read_run(make_run("main", tasks=("digit",)))) == []


def test_cosines_of_other_tasks_are_refused(make_run):
    folder = make_run("main", tasks=("surface", "digit"))
    write_records(folder, [{"step": 1, "all/cosine": [[1.0]]}])
    with pytest.raises(ValueError, match=r"shape \(1, 1\) for 2 tasks"):
        cosine_images(read_run(folder))


def test_cosines_that_change_shape_are_refused(make_run):
    folder = make_run("main", tasks=("surface", "digit"))
    cosines = [[[1.0]], [[1.0, 0.0], [0.0, 1.0]]]
    write_records(folder, [{"step": 1, "all/cosine": value} for value in cosines])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: 'all/cosine'"):
        cosine_images(read_run(folder))


def test_expert_use_is_the_last_tenth(make_run):
    folder = make_run("main", tasks=("surface", "digit"))
    records = [
        {
            "step": step,
            "surface/expert_load/block_1": [0.0, 1.0] if step > 18 else [1.0, 0.0],
            "digit/expert_load/block_1": [3.0, 1.0],
        }
        for step in range(1, 21)
    ]
    write_records(folder, records)
    (image,) = expert_images(read_run(folder))
    assert "surface 1 (100%), digit 0 (75%)" in image.alt


def test_dense_trunk_has_no_expert_map(make_run):
    run = read_run(make_run("main", tasks=("digit",), dense_trunk=True))
    assert expert_images(run) == []


def test_a_constant_predictor_of_zero_is_drawn(make_run):
    folder = make_run("main", tasks=("slope",))
    records = [{"step": step, "slope/r2": 0.3} for step in (1, 2)]
    write_records(folder, records)
    with_zero = metric_panels(read_run(folder))[0]
    result = json.loads((folder / "result.json").read_text())
    result["tasks"]["slope"]["metrics"]["r2"]["constant_predictor"] = None
    (folder / "result.json").write_text(json.dumps(result))
    assert metric_panels(read_run(folder))[0].source != with_zero.source


def test_losses_that_are_not_finite_or_not_positive_still_draw(make_run):
    folder = make_run("main", tasks=("digit",))
    losses = [1.0, 0.0, float("nan"), float("inf"), -1.0, 0.5]
    records = [{"step": n, "digit/loss": loss} for n, loss in enumerate(losses)]
    write_records(folder, records)
    (panel,) = loss_panels(read_run(folder))
    assert "from 1.0000 to 0.5000" in panel.alt


def test_dollar_signs_are_no_mathematics(make_run):
    folder = make_run("main", tasks=("digit",))
    text = (folder / "result.json").read_text().replace('"digit"', '"$\\\\frac$"')
    (folder / "result.json").write_text(text)
    write_records(folder, [{"step": 1, "$\\frac$/loss": 1.0}])
    (panel,) = loss_panels(read_run(folder))
    assert panel.source.startswith("data:image/png;base64,")


def test_class_pixels():
    classes = np.array([[0, 1], [-1, 9]])
    pixels = class_pixels(classes, 2)
    hexadecimal = [[to_hex(pixel / 255) for pixel in row] for row in pixels]
    blue, red = (color.lower() for color in class_colors(2))
    assert hexadecimal == [[blue, red], [UNLABELLED, UNLABELLED]]


@pytest.mark.parametrize("count", [1, 7, 8, 40])
def test_class_colors_differ(count):
    assert len({*class_colors(count), UNLABELLED}) == count + 1


def test_value_pixels_share_a_scale_and_grey_out_nan():
    values = np.array([[-5.0, 0.0, 0.5, 1.0, 9.0, np.nan]])
    pixels = value_pixels(values, 0.0, 1.0)[0]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    np.testing.assert_array_equal(pixels[3], pixels[4])
    # The ends of viridis.
    assert pixels[1].tolist() == [68, 1, 84]
    assert pixels[3].tolist() == [253, 231, 37]
    assert pixels[5].tolist() == [179, 179, 179]


def test_tiles_show_the_samples(make_run):
    run = read_run(make_run("main", tasks=("surface", "elevation", "digit")))
    surface, elevation = dense_tasks(run)
    assert (surface.task, elevation.task) == ("surface", "elevation")
    assert [name for _, name in surface.legend] == ["ocean", "land"]
    assert surface.has_unlabelled
    tile = surface.tiles[2]
    np.testing.assert_array_equal(decoded(tile.image), run.samples["earth/image"][2])
    expected = class_pixels(run.samples["earth/surface/target"][2], 2)
    np.testing.assert_array_equal(decoded(tile.target), expected)
    truth = run.samples["earth/elevation/target"]
    assert elevation.high == f"{np.nanmax(truth):.3g}"
    guess = run.samples["earth/elevation/prediction"][0]
    expected = value_pixels(guess, np.nanmin(truth), np.nanmax(truth))
    np.testing.assert_array_equal(decoded(elevation.tiles[0].prediction), expected)


def test_misclassified_images(make_run):
    folder = make_run("main", tasks=("left", "right"))
    np.savez(
        folder / "samples.npz",
        **{
            "multi_digits/image": np.full((2, 4, 4, 1), 7, np.uint8),
            "multi_digits/left/target": np.array([3, -1]),
            "multi_digits/left/prediction": np.array([5, 2]),
            "multi_digits/right/target": np.array([1, 0]),
            "multi_digits/right/prediction": np.array([1, 0]),
        },
    )
    (entry,) = labelled_images(read_run(folder))
    (image, first), (_, second) = entry.examples
    assert decoded(image).tolist() == np.full((4, 4, 3), 7).tolist()
    assert [(v.target, v.prediction, v.wrong) for v in first] == [
        ("3", "5", True),
        ("1", "1", False),
    ]
    # An example without a label can't be wrong.
    assert [(v.target, v.wrong) for v in second] == [("no label", False), ("0", False)]
    assert not entry.misclassified


@pytest.mark.parametrize(
    ("name", "array", "named"),
    [
        ("digits/image", np.zeros((9, 32, 32)), "digits/image' is float64"),
        ("digits/digit/target", np.zeros(4, int), "digits/digit/target' .4,."),
        ("digits/digit/prediction", np.zeros((9, 2), int), "its prediction .9, 2."),
    ],
)
def test_samples_that_do_not_fit_are_named(make_run, name, array, named):
    folder = make_run("main", tasks=("digit",))
    samples = dict(read_run(folder).samples)
    np.savez(folder / "samples.npz", **{**samples, name: array})
    with pytest.raises(ValueError, match=named):
        labelled_images(read_run(folder))
