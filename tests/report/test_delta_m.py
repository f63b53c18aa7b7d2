"""Delta-m against published rows and against the definition by hand."""

import math

import pytest

from mtl_jax.report import delta_m_metrics, delta_m_tasks

# NYUv2 with SegNet-MTAN: mIoU, pixel accuracy | absolute, relative depth error |
# mean, median angle, share within 11.25°, 22.5° and 30°.
SINGLE = [0.3830, 0.6376, 0.6754, 0.2780, 25.01, 19.21, 0.3014, 0.5720, 0.6915]
NASH = [0.4013, 0.6593, 0.5261, 0.2171, 25.26, 20.08, 0.2840, 0.5547, 0.6815]
LINEAR = [0.3929, 0.6533, 0.5493, 0.2263, 28.15, 23.96, 0.2209, 0.4750, 0.6108]
HIGHER = [True, True, False, False, False, False, True, True, True]
TASKS = ["segmentation"] * 2 + ["depth"] * 2 + ["normal"] * 5


@pytest.mark.parametrize(
    ("values", "over_metrics", "over_tasks"),
    [(NASH, -4.047, 7.65), (LINEAR, 5.589, 0.88)],
)
def test_published_rows(values, over_metrics, over_tasks):
    found = delta_m_metrics(values, SINGLE, HIGHER)
    assert found == pytest.approx(over_metrics, abs=5e-4)
    found = delta_m_tasks(values, SINGLE, HIGHER, TASKS)
    assert found == pytest.approx(over_tasks, abs=5e-3)


def test_by_hand():
    # Gains: +10 %, -20 % (an error that grew), +50 %; a task mean of (10-20)/2 = -5.
    values, baselines, higher = [1.1, 1.2, 3.0], [1.0, 1.0, 2.0], [True, False, True]
    assert delta_m_metrics(values, baselines, higher) == pytest.approx(-40 / 3)
    found = delta_m_tasks(values, baselines, higher, ["a", "a", "b"])
    assert found == pytest.approx((-5 + 50) / 2)
    # The tasks' order and interleaving don't matter.
    found = delta_m_tasks([1.1, 3.0, 1.2], [1, 2, 1], [True, True, False], "aba")
    assert found == pytest.approx((-5 + 50) / 2)


@pytest.mark.parametrize(
    ("values", "baselines", "higher", "named"),
    [
        ([], [], [], "values is empty"),
        ([1.0], [0.0], [True], "baselines"),
        ([1.0], [-0.5], [True], "baselines"),
        ([1.0], [math.nan], [True], "baselines"),
        ([math.inf], [1.0], [True], "values"),
        ([1.0, 2.0], [1.0], [True], "shapes"),
    ],
)
def test_bad_input_is_named(values, baselines, higher, named):
    with pytest.raises(ValueError, match=named):
        delta_m_metrics(values, baselines, higher)


def test_every_metric_needs_a_task():
    with pytest.raises(ValueError, match="tasks has 1 entries for 2"):
        delta_m_tasks([1.0, 1.0], [1.0, 1.0], [True, True], ["a"])
