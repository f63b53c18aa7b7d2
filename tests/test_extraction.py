"""What extraction refuses and counts, and that a task keeps its metrics.

The command is run in docs/mod_squad.md, too.
"""

import functools
import json
import types
from pathlib import Path

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mtl_jax import configuration, train
from mtl_jax.extraction import extract_run, format_extraction, forward_flops
from mtl_jax.layers.heads import Classification
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.gates import Gate
from mtl_jax.layers.moe.routers import LossFree
from mtl_jax.models import MultitaskModel, VisionTransformer
from mtl_jax.models.experts import expert_layers
from mtl_jax.train.evaluate import make_evaluate

TRUNK = VisionTransformer(width=8, depth=2, num_heads=2, patch_size=4, mlp_ratio=2)
EXPERTS = functools.partial(
    MoE, num_experts=4, num_selected=2, expert_hidden=16, group_size=1
)


def run(trunk, task, output):
    """Only what the checks look at."""
    tasks = (types.SimpleNamespace(name="digit"), types.SimpleNamespace(name="left"))
    experiment = types.SimpleNamespace(tasks=tasks, trunk=trunk)
    program = types.SimpleNamespace(experiment=experiment)
    return extract_run(program, None, None, task, output)  # type: ignore[arg-type]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="task is 'right'; the run has digit, left"):
        run(TRUNK.clone(moe=EXPERTS), "right", tmp_path)
    with pytest.raises(ValueError, match="has no experts to choose from"):
        run(TRUNK, "digit", tmp_path)
    with pytest.raises(ValueError, match="has no experts to choose from"):
        run(nn.Dense(3), "digit", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run already; choose another"):
        run(TRUNK.clone(moe=EXPERTS), "digit", tmp_path)


def test_flops_of_the_rows_that_experts_get():
    """Of 2 blocks of width 8 on 4 tokens, by hand.

    Patches of 48 values: 4·2·48·8 = 3072. Attention of each block: queries, keys and
    values 3·2·8·8·4 = 1536, the output 512, products with keys and values 2·2·4·4·8 =
    512. Perceptron: 2·2·8·16·4 = 2048. Gate: 2·8·4·4 = 256. Experts: each token goes to
    2, which makes 8 rows of 2·2·8·16 = 512 each. Head: 2·8·3 = 48.
    """
    model = MultitaskModel(TRUNK.clone(moe=EXPERTS), {"digit": Classification(3)})
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    params = nn.unbox(
        jax.eval_shape(lambda: model.init(jax.random.key(0), {"digit": images}))
    )
    expected = 3072 + 2 * (1536 + 512 + 512) + 2048 + 256 + 8 * 512 + 48
    assert forward_flops(model, params, {}, "digit", images) == expected
    roomy = functools.partial(EXPERTS, evaluation_capacity_factor=1.5)
    model = MultitaskModel(TRUNK.clone(moe=roomy), model.heads)
    assert forward_flops(model, params, {}, "digit", images) == expected
    dense = MultitaskModel(TRUNK, {"digit": Classification(3)})
    params = nn.unbox(
        jax.eval_shape(lambda: dense.init(jax.random.key(0), {"digit": images}))
    )
    expected += 2048 - 256 - 8 * 512
    assert forward_flops(dense, params, {}, "digit", images) == expected


def test_the_table():
    metrics = {"loss": 0.25, "accuracy": 0.5, "constant_predictor": {"accuracy": 0.1}}
    report = {
        "task": "digit",
        "usage": {"block_1": [1.0, 0.5, 0.5, 0.0]},
        "kept": {"block_1": [0, 1, 2]},
        "before": {"parameters": 12345, "flops": 67, "metrics": metrics},
        "after": {"parameters": 1234, "flops": 67, "metrics": metrics},
    }
    lines = [line.split() for line in format_extraction(report).splitlines()]
    assert lines == [
        ["all", "tasks", "digit"],
        ["parameters", "12,345", "1,234"],
        ["FLOPs", "an", "example", "67", "67"],
        ["loss", "0.2500", "0.2500"],
        ["accuracy", "0.5000", "0.5000"],
        ["experts", "of", "block_1", "4", "3"],
    ]


def opened(folder):
    """The program of a run, and its state at the last checkpoint."""
    config = configuration.from_document(folder.read_json("config.json"))
    program = train.build_program(configuration.build(config))
    return program, train.restore_run(program, folder, None)


@pytest.mark.slow
def test_a_task_keeps_its_metrics_with_the_experts_that_it_uses(tmp_path):
    """On 8 devices, of a run of two steps that move the bias of the router.

    Sizes by hand, of width 8: an expert has (8 + 1)·16 + (16 + 1)·8 = 280 parameters,
    a task's column of the gate 8 for each expert and its head (8 + 1)·10 = 90. Of an
    image's 4 tokens the gate makes 2·8·4 = 64 FLOPs for each expert, and each has a
    buffer of at least one row of 2·2·8·16 = 512.
    """
    with jax.numpy_dtype_promotion("standard"):
        config = configuration.load_config(
            str(Path(__file__).with_name("extraction_config.py"))
        )
        whole = train.RunFolder(tmp_path / "whole")
        whole.write_json("config.json", configuration.to_document(config, "tests"))
        train.train(train.build_program(configuration.build(config)), whole, "tests")
        program, state = opened(whole)
        report = extract_run(program, state, whole, "right", tmp_path / "right", 0.0)
        small = train.RunFolder(tmp_path / "right")
        small_program, small_state = opened(small)
        metrics = make_evaluate(small_program)(small_state.variables, None)

    last = json.loads((whole.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    # Far from what it is where all logits are the same.
    assert abs(last["right/test_loss"] - np.log(10)) > 0.01
    expected = {"loss": last["right/test_loss"], "accuracy": last["right/accuracy"]}
    for found in (report["before"], report["after"], {"metrics": metrics["right"]}):
        for name, value in expected.items():
            np.testing.assert_allclose(found["metrics"][name], value, rtol=1e-5)

    left_out = 24 - len(report["kept"]["block_0"])
    assert left_out > 4
    used = np.array(report["usage"]["block_0"])
    np.testing.assert_array_equal(report["kept"]["block_0"], np.flatnonzero(used))
    before, after = report["before"], report["after"]
    fewer = left_out * (280 + 8) + 24 * 8 + 90
    assert before["parameters"] - after["parameters"] == fewer
    assert before["flops"] - after["flops"] == left_out * (64 + 512)


@pytest.mark.slow
def test_a_task_that_does_not_see_all_experts_keeps_its_metrics(tmp_path):
    """As the one before, where task ``right`` sees 6 of 24 experts."""
    with jax.numpy_dtype_promotion("standard"):
        config = configuration.load_config(
            str(Path(__file__).with_name("extraction_config.py"))
        )
        gate = fdl.Partial(Gate, visible_experts=(24, 6))
        config.trunk.moe[0].router = fdl.Partial(LossFree, gate=gate)
        whole = train.RunFolder(tmp_path / "whole")
        whole.write_json("config.json", configuration.to_document(config, "tests"))
        train.train(train.build_program(configuration.build(config)), whole, "tests")
        program, state = opened(whole)
        report = extract_run(program, state, whole, "right", tmp_path / "right", 0.0)
        small_program, small_state = opened(train.RunFolder(tmp_path / "right"))
        metrics = make_evaluate(small_program)(small_state.variables, None)["right"]

    kept = report["kept"]["block_0"]
    assert len(kept) > 1
    assert max(kept) < 6
    layers = expert_layers(small_program.experiment.model.trunk)
    assert [layer.visible_experts for layer in layers] == [(len(kept),)]
    for name, value in report["before"]["metrics"].items():
        if name != "constant_predictor":
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
