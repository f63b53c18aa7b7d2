"""The step builders of the benchmark of methods, its records and its page."""

import dataclasses
import importlib
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import optim
from mtl_jax.layers.patch import patchify
from mtl_jax.tasks import (
    Task,
    accuracy,
    huber,
    mean_absolute_error,
    softmax_cross_entropy,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


def module(name):
    return importlib.import_module(name)


class TinyTrunk(nn.Module):
    """Four features of every 4 x 4 pixels: compiles faster than convolutions."""

    @nn.compact
    def __call__(self, images):
        x = patchify(images.astype(jnp.float32) / 255, 4)
        return nn.tanh(nn.Dense(4)(x))


@pytest.fixture(scope="module")
def problem():
    """Twelve random images of 8 x 8; a class for each, and values for its pixels."""
    problems = module("small_problems")
    rng = np.random.default_rng(0)
    arrays = {
        "image": jnp.asarray(rng.integers(0, 256, (12, 8, 8, 1)), jnp.uint8),
        "kind": jnp.asarray(rng.integers(0, 3, (12, 8, 8)), jnp.int32),
        "height": jnp.asarray(rng.normal(size=(12, 8, 8)), jnp.float32),
    }
    tasks = (
        Task("kind", problems.PixelHead(3), softmax_cross_entropy, (accuracy(),)),
        Task("height", problems.PixelHead(), huber, (mean_absolute_error(),)),
    )
    splits = dict.fromkeys(("train", "valid", "test"), arrays)
    return problems.Problem("random", tasks, TinyTrunk(), splits, 4, 3)


@pytest.fixture(scope="module")
def params(problem):
    return jax.jit(problem.init)(jax.random.key(0))


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(5, 2, "SAME"), (3, 2, "VALID"), (4, 1, "SAME")]
)
def test_unfolded_convolution_is_a_convolution(size, stride, padding):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 7, 9, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 4)), jnp.float32)
    strides = (stride, stride)

    @jax.jit
    def both(images, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return (
            module("small_problems").unfolded_convolution(
                images, kernel, strides, padding
            ),
            jax.lax.conv_general_dilated(
                images, kernel, strides, padding, dimension_numbers=layout
            ),
        )

    found, expected = both(images, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def plain(problem, params):
    """Losses, and the gradient of their sum."""
    batch = problem.splits["train"]

    def total(params):
        losses = problem.losses(params, batch)
        return jnp.sum(losses), losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return losses, gradient


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
        found,
        expected,
    )


# Each kind of step, made such that it must give the gradient of the summed losses.
PLAIN = {
    "at_params": lambda rules: rules.at_params(optim.sum),
    "at_features": lambda rules: rules.at_features(optim.sum),
    "balanced": lambda rules: rules.balanced(optim.equal),
    "sharp": lambda rules: rules.sharp(optim.sharpness_aware, rho=0.0),
    "flat": lambda rules: rules.flat(optim.sum, rho=0.0),
    "samo": lambda rules: rules.samo(optim.sum, rho=0.0),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_every_kind_of_step_can_be_a_plain_sum(kind, problem, params, plain):
    rule = PLAIN[kind](module("method_rules"))(problem)
    batch = problem.splits["train"]
    state = rule.init(params, batch)
    gradient, _ = jax.jit(rule.gradient)(params, state, [batch], jax.random.key(0))
    assert_close(gradient, plain[1])


def test_weights_reach_the_heads(problem, params, plain):
    rule = module("method_rules").balanced(optim.scale_invariant)(problem)
    batch = problem.splits["train"]
    gradient, _ = jax.jit(rule.gradient)(params, None, [batch], jax.random.key(0))
    losses, expected = plain
    for name, loss in zip(("kind", "height"), losses, strict=True):
        scaled = jax.tree.map(lambda leaf, loss=loss: leaf / loss, expected["heads"])
        assert_close(gradient["heads"][name], scaled[name])


def test_steps_of_three_batches(problem, params):
    rules = module("method_rules")
    make = lambda k: optim.modo(k, learning_rate=1.0, regularization=0.0)  # noqa: E731
    rule = rules.at_params(make, num_batches=3)(problem)
    assert rule.num_batches == 3
    batches = [
        {name: array[i : i + 4] for name, array in problem.splits["train"].items()}
        for i in (0, 4, 8)
    ]
    state = rule.init(params, batches[0])
    evaluate = jax.jit(rule.gradient)
    _, first = evaluate(params, state, batches, jax.random.key(0))
    _, other = evaluate(params, state, [batches[1], *batches[1:]], jax.random.key(0))
    _, third = evaluate(params, state, [*batches[:2], batches[0]], jax.random.key(0))
    # The weights are made by the second and the third batch alone.
    np.testing.assert_array_equal(first.weights, other.weights)
    assert not np.allclose(first.weights, third.weights)


def test_observation_comes_after_the_update(problem, params):
    rule = module("method_rules").balanced(optim.famo)(problem)
    batch = problem.splits["train"]
    state = rule.init(params, batch)
    gradient, state = jax.jit(rule.gradient)(params, state, [batch], jax.random.key(0))
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    before = np.asarray(state.logits.values)
    after = np.asarray(jax.jit(rule.observe)(moved, state, batch).logits.values)
    assert not np.allclose(before, after)


def test_saliency_regularized_step(problem, params):
    rule = module("method_rules").saliency_regularized(problem)
    batch = problem.splits["train"]

    def objective(params):
        features = problem.features(params["trunk"], batch)
        losses = problem.losses(params, batch)
        saliencies = []
        for name, loss in problem.feature_losses.items():
            slope = jax.grad(loss)(features, params["heads"][name], batch)
            saliencies.append(slope / loss(features, params["heads"][name], batch))
        stacked = jnp.stack(saliencies)
        return (
            jnp.sum(jnp.log(losses))
            + optim.task_saliency_entropy(stacked)
            + optim.cross_task_alignment(stacked, 1.0)
        )

    gradient, _ = jax.jit(rule.gradient)(params, None, [batch], jax.random.key(0))
    expected = jax.jit(jax.grad(objective))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
        gradient,
        expected,
    )


@pytest.fixture(scope="module")
def result(problem, tmp_path_factory):
    """Records of two methods and of each task alone."""
    folder = tmp_path_factory.mktemp("runs")
    # Optax's Adam raises a float to the power of an int32.
    with jax.numpy_dtype_promotion("standard"):
        records = module("methods").measure(problem, ["sum", "mgda_ub"], folder)
    return folder, records


def test_records(result, problem):
    folder, records = result
    assert {file.stem for file in folder.iterdir()} == {
        "kind",
        "height",
        "sum",
        "mgda_ub",
    }
    methods = module("methods")
    for record in records["methods"].values():
        seeds = [run["seed"] for run in record["runs"]]
        assert seeds == [0] * len(methods.LEARNING_RATES) + [1, 2]
        rates = [run["learning_rate"] for run in record["runs"]]
        assert rates[:-2] == [*methods.LEARNING_RATES]
        assert rates[-2:] == [record["best"]] * 2
        for run in record["runs"]:
            assert all(np.isfinite(value) for value in run["test"].values())


def test_learning_rate_is_chosen_by_validation(result, problem):
    methods = module("methods")
    _, records = result
    references = {
        name: methods.chosen(record)[0]["valid"][name]
        for name, record in records["single"].items()
    }
    for record in records["methods"].values():
        tuning = record["runs"][: len(methods.LEARNING_RATES)]
        gains = [
            (run["valid"]["kind"] - references["kind"]) / references["kind"]
            - (run["valid"]["height"] - references["height"]) / references["height"]
            for run in tuning
        ]
        assert tuning[int(np.argmax(gains))]["learning_rate"] == record["best"]


def test_what_is_done_is_not_repeated(result, problem, monkeypatch):
    folder, records = result
    methods = module("methods")

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(methods, "training", refuse)
    again = methods.measure(problem, ["sum", "mgda_ub"], folder)
    assert again["methods"] == json.loads(json.dumps(records["methods"]))
    longer = dataclasses.replace(problem, num_steps=5)
    with pytest.raises(ValueError, match="other settings"):
        methods.measure(longer, ["sum"], folder)


def make_record(scores, seconds=1.0):
    """A record whose three chosen runs have given test scores of the one task `a`."""
    runs = [
        {
            "learning_rate": 0.1,
            "seed": seed,
            "cpu_seconds": seconds,
            "valid": {"a": score},
            "test": {"a": score},
        }
        for seed, score in enumerate(scores)
    ]
    return {
        "settings": {"num_steps": 10},
        "best": 0.1,
        "compile_seconds": 60.0,
        "cpu_seconds": 120.0,
        "runs": runs,
    }


def test_page():
    methods_page = module("methods_page")
    problem = {
        "name": "multi_mnist",
        "tasks": {"a": ["accuracy", True]},
        "num_steps": 10,
        "batch_size": 4,
        "examples": {"train": 1000, "valid": 100, "test": 100},
        "learning_rates": [0.1],
        "seeds": [0, 1, 2],
    }
    result = {
        "problem": problem,
        "single": {"a": make_record([0.5, 0.5, 0.5])},
        "methods": {
            "sum": make_record([0.50, 0.52, 0.54]),
            "good": make_record([0.55, 0.56, 0.57], seconds=2.0),
            "noisy": make_record([0.40, 0.53, 0.60]),
            "bad": make_record([0.47, 0.48, 0.49]),
            "wild": make_record([0.47, 0.48, float("nan")]),
        },
    }
    kinds = dict.fromkeys(result["methods"], "losses")
    text = methods_page.page({"multi_mnist": result}, kinds, "sum")
    # Mean gains over 0.5: 12, 4, 2 and -4 per cent.
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [row[0].strip("|` ") for row in rows] == [
        "good",
        "sum",
        "noisy",
        "bad",
        "wild",
    ]
    good = [cell.strip(" |") for cell in rows[0]]
    assert good[2:] == [
        "0.560 ± 0.010",
        "12.00 ± 2.00",
        "1.0",
        "better",
        "2.0",
        "0.1",
    ]
    assert rows[2][5] == "no difference"
    assert rows[3][3] == "−4.00 ± 2.00"
    assert rows[3][5] == "worse"
    assert rows[4][2:4] == ["diverged", "diverged"]
    # Six records of two minutes each, one of them for compiling.
    assert "12 minutes of one CPU core for 18 runs, of which 6 went" in text


def test_every_method_makes_gradients(problem, params):
    methods = module("methods")
    batch = problem.splits["train"]
    for name, method in methods.METHODS.items():
        rule = method.rule(problem)
        state = rule.init(params, batch)
        batches = [batch] * rule.num_batches
        gradient, _ = jax.eval_shape(
            rule.gradient, params, state, batches, jax.random.key(0)
        )
        found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), gradient)
        expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
        assert found == expected, name


@pytest.mark.slow
def test_problems():
    problems = module("small_problems")
    for make in (problems.multi_mnist, problems.earth_tiles):
        problem = make()
        sizes = {split: len(a["image"]) for split, a in problem.splits.items()}
        assert min(sizes.values()) >= 300
        batch = {name: array[:2] for name, array in problem.splits["train"].items()}
        params = problem.init(jax.random.key(0))
        losses = problem.losses(params, batch)
        assert losses.shape == (len(problem.tasks),)
        assert isinstance(problem.trunk, nn.Module)
        assert np.isfinite(losses).all()
