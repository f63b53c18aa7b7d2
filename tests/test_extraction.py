"""What extraction refuses and counts. That it works is in docs/mod_squad.md."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mtl_jax.extraction import extract_run, format_extraction, forward_flops
from mtl_jax.layers.heads import Classification
from mtl_jax.layers.moe import MoE
from mtl_jax.models import MultitaskModel, VisionTransformer

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
