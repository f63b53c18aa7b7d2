import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.tasks import accuracy, mean_absolute_error, mean_iou, r2
from mtl_jax.tasks.metrics import element_mask

NUM_CLASSES = 4


def class_data(shape=(6, 5, 3), seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, NUM_CLASSES)).astype(np.float32)
    # Class 3 never occurs in the targets.
    target = rng.integers(-1, NUM_CLASSES - 1, size=shape).astype(np.int32)
    return logits, target, rng.random(shape[0]) < 0.7


def value_data(shape=(6, 5, 3), seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(loc=2, size=shape).astype(np.float32)
    prediction = target + rng.normal(size=shape).astype(np.float32)
    target[rng.random(shape) < 0.2] = np.nan
    return prediction, target, rng.random(shape[0]) < 0.7


def sums_of(metric, prediction, target, mask):
    sums = jax.jit(metric.update)(*map(jnp.array, (prediction, target, mask)))
    return {name: np.asarray(value, np.float64) for name, value in sums.items()}


def kept(prediction, target, mask):
    """(prediction, target) of the elements that count, one by one."""
    for place in np.ndindex(*target.shape):
        known = not np.isnan(target[place]) and target[place] != -1
        if mask[place[0]] and known:
            yield prediction[place], target[place]


def test_the_mask_covers_whole_examples_and_unlabelled_elements():
    mask = element_mask(jnp.array([True, False]), jnp.array([[0, -1], [1, 1]]))
    assert mask.tolist() == [[True, False], [False, False]]


def test_accuracy_against_counting():
    logits, target, mask = class_data()
    pairs = [(np.argmax(p), t) for p, t in kept(logits, target, mask)]
    counts = np.bincount([t for _, t in pairs], minlength=NUM_CLASSES)
    sums = sums_of(accuracy(), logits, target, mask)
    assert sums["class_counts"].tolist() == counts.tolist()
    expected = np.mean([guess == truth for guess, truth in pairs])
    assert accuracy().compute(sums) == pytest.approx(expected)
    constant = max(np.mean([k == t for _, t in pairs]) for k in range(NUM_CLASSES))
    assert accuracy().constant_predictor(sums) == pytest.approx(constant)


def brute_force_iou(pairs):
    scores = []
    for k in range(NUM_CLASSES):
        truth = {i for i, (_, t) in enumerate(pairs) if t == k}
        guess = {i for i, (g, _) in enumerate(pairs) if g == k}
        if truth:
            scores.append(len(truth & guess) / len(truth | guess))
    return np.mean(scores)


def test_mean_iou_against_sets():
    logits, target, mask = class_data()
    pairs = [(np.argmax(p), t) for p, t in kept(logits, target, mask)]
    sums = sums_of(mean_iou(), logits, target, mask)
    assert mean_iou().compute(sums) == pytest.approx(brute_force_iou(pairs))
    constant = max(
        brute_force_iou([(k, truth) for _, truth in pairs]) for k in range(NUM_CLASSES)
    )
    assert mean_iou().constant_predictor(sums) == pytest.approx(constant)


def test_mean_iou_by_hand():
    # Truth 0 0 1, guess 0 1 1: 1 of 2 for class 0, 1 of 2 for class 1.
    logits = np.eye(2, dtype=np.float32)[[0, 1, 1]]
    target = np.array([0, 0, 1], np.int32)
    sums = sums_of(mean_iou(), logits, target, np.ones(3, bool))
    assert mean_iou().compute(sums) == 0.5
    # Always 0: 2 of 3 for class 0, none of class 1.
    assert mean_iou().constant_predictor(sums) == pytest.approx(1 / 3)


def test_r2_against_float64():
    prediction, target, mask = value_data()
    p, t = np.array(list(kept(prediction, target, mask)), np.float64).T
    expected = 1 - np.sum((p - t) ** 2) / np.sum((t - t.mean()) ** 2)
    metric = r2()
    sums = sums_of(metric, prediction, target, mask)
    assert metric.compute(sums) == pytest.approx(expected, rel=1e-5)
    mean = np.full_like(prediction, t.mean())
    of_mean = metric.compute(sums_of(metric, mean, target, mask))
    assert of_mean == pytest.approx(metric.constant_predictor(sums), abs=1e-5)
    exact = metric.compute(sums_of(metric, np.nan_to_num(target), target, mask))
    assert exact == 1.0


def test_mean_absolute_error_against_float64():
    prediction, target, mask = value_data()
    p, t = np.array(list(kept(prediction, target, mask)), np.float64).T
    metric = mean_absolute_error()
    sums = sums_of(metric, prediction, target, mask)
    assert metric.compute(sums) == pytest.approx(np.mean(np.abs(p - t)), rel=1e-5)
    assert metric.constant_predictor is None
    assert not metric.higher_is_better


@pytest.mark.parametrize(
    ("metric", "data"),
    [
        (accuracy(), class_data),
        (mean_iou(), class_data),
        (r2(), value_data),
        (mean_absolute_error(), value_data),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_sums_add_up_over_any_split_of_the_batch(metric, data):
    whole = data()
    total = sums_of(metric, *whole)
    for cut in (1, 4):
        parts = [
            sums_of(metric, *(x[s] for x in whole))
            for s in (slice(cut), slice(cut, None))
        ]
        for name, value in total.items():
            np.testing.assert_allclose(
                parts[0][name] + parts[1][name], value, rtol=1e-5
            )


@pytest.mark.parametrize("metric", [accuracy(), mean_iou()], ids=lambda m: m.name)
def test_labels_of_whole_images_are_judged_too(metric):
    logits, target, mask = class_data(shape=(50,))
    assert 0 <= metric.compute(sums_of(metric, logits, target, mask)) <= 1


@pytest.mark.parametrize("metric", [r2(), mean_absolute_error()], ids=lambda m: m.name)
def test_padding_may_hold_anything(metric):
    prediction, target, _ = value_data()
    mask = np.array([True] * 4 + [False] * 2)
    prediction[4:] = np.inf
    padded = sums_of(metric, prediction, target, mask)
    alone = sums_of(metric, prediction[:4], target[:4], mask[:4])
    assert metric.compute(padded) == pytest.approx(metric.compute(alone))
