import functools

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import features
from float64_vit import ACTIVATIONS, attention, dense, float64, layer_norm, patches

from mtl_jax.models.pretrained import convert_big_vision, load_big_vision

WIDTH, HEADS, HIDDEN, DEPTH, PATCH, SIDE = 8, 2, 12, 2, 2, 3
GELU = ACTIVATIONS["tanh"]

# Names as in big_vision's vit.py, and as in vision_transformer's, which came first.
NAMES = {
    "newer": ("MultiHeadDotProductAttention_0", "MlpBlock_0", "LayerNorm_1"),
    "older": ("MultiHeadDotProductAttention_1", "MlpBlock_3", "LayerNorm_2"),
}


def shapes(age):
    """Names and shapes of a model with a class token and a classifier."""
    attend, mlp, second = NAMES[age]
    kv = WIDTH // HEADS
    block = {
        "LayerNorm_0/scale": (WIDTH,),
        "LayerNorm_0/bias": (WIDTH,),
        f"{second}/scale": (WIDTH,),
        f"{second}/bias": (WIDTH,),
        **{f"{attend}/{n}/kernel": (WIDTH, HEADS, kv) for n in ("query", "key")},
        f"{attend}/value/kernel": (WIDTH, HEADS, kv),
        **{f"{attend}/{n}/bias": (HEADS, kv) for n in ("query", "key", "value")},
        f"{attend}/out/kernel": (HEADS, kv, WIDTH),
        f"{attend}/out/bias": (WIDTH,),
        f"{mlp}/Dense_0/kernel": (WIDTH, HIDDEN),
        f"{mlp}/Dense_0/bias": (HIDDEN,),
        f"{mlp}/Dense_1/kernel": (HIDDEN, WIDTH),
        f"{mlp}/Dense_1/bias": (WIDTH,),
    }
    positions = {
        "newer": {"pos_embedding": (1, SIDE**2, WIDTH)},
        # The class token had a position too.
        "older": {
            "Transformer/posembed_input/pos_embedding": (1, SIDE**2 + 1, WIDTH),
        },
    }
    return {
        "embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "cls": (1, 1, WIDTH),
        **positions[age],
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
        "head/kernel": (WIDTH, 5),
        "head/bias": (5,),
        **{
            f"Transformer/encoderblock_{i}/{name}": shape
            for i in range(DEPTH)
            for name, shape in block.items()
        },
    }


@functools.cache
def arrays(age="newer"):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.4, shape).astype(np.float32)
        for name, shape in shapes(age).items()
    }


def part(arrays, prefix):
    return {
        name.removeprefix(f"{prefix}/"): array
        for name, array in arrays.items()
        if name.startswith(f"{prefix}/")
    }


def oracle(arrays, age, image, positions=None):
    """All tokens of one image behind the last norm, in float64."""
    attend, mlp, second = NAMES[age]
    kernel = arrays["embedding/kernel"].reshape(-1, WIDTH)
    x = patches(image, PATCH) @ kernel + arrays["embedding/bias"]
    if positions is not None:
        x = np.concatenate([arrays["cls"][0], x + positions.reshape(-1, WIDTH)])
    elif age == "older":
        x = np.concatenate([arrays["cls"][0], x])
        x = x + arrays["Transformer/posembed_input/pos_embedding"][0]
    else:
        x = np.concatenate([arrays["cls"][0], x + arrays["pos_embedding"][0]])
    for i in range(DEPTH):
        block = part(arrays, f"Transformer/encoderblock_{i}")
        layers = [
            part(block, f"{attend}/{n}") for n in ("query", "key", "value", "out")
        ]
        x = x + attention(layer_norm(x, part(block, "LayerNorm_0")), *layers)
        y = layer_norm(x, part(block, second))
        hidden = GELU(dense(y, part(block, f"{mlp}/Dense_0")))
        x = x + dense(hidden, part(block, f"{mlp}/Dense_1"))
    return layer_norm(x, part(arrays, "Transformer/encoder_norm"))


def check(pretrained, arrays, age, positions=None):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 6, 6, 3))
    actual = features(pretrained, images.astype(np.float32), class_token="appended")
    for image, found in zip(images, actual, strict=True):
        expected = oracle(float64(arrays), age, image, positions)
        np.testing.assert_allclose(
            found[..., :WIDTH].reshape(-1, WIDTH), expected[1:], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            found[0, 0, WIDTH:], expected[0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("age", NAMES)
def test_features_against_float64(age, tmp_path):
    np.savez(tmp_path / "model.npz", **arrays(age))
    pretrained = load_big_vision(tmp_path / "model.npz")
    check(pretrained, arrays(age), age)
    named = {source for row in pretrained.rows for source in row.sources}
    assert named == set(arrays(age))
    ignored = {
        name for row in pretrained.rows if not row.parameter for name in row.sources
    }
    assert ignored == {"head/kernel", "head/bias"}


def test_parameters_are_the_arrays_themselves():
    params = convert_big_vision(arrays()).params
    block = part(arrays(), "Transformer/encoderblock_1")
    ours = params["block_1"]
    for name, theirs in (("query", "query"), ("output", "out")):
        for leaf in ("kernel", "bias"):
            np.testing.assert_array_equal(
                ours["attention"][name][leaf],
                block[f"MultiHeadDotProductAttention_0/{theirs}/{leaf}"],
            )
    np.testing.assert_array_equal(
        ours["mlp"]["down"]["kernel"], block["MlpBlock_0/Dense_1/kernel"]
    )
    np.testing.assert_array_equal(params["class_token"], arrays()["cls"][0])


def test_blocks_of_a_scan_are_unstacked():
    stacked = {
        name: array
        for name, array in arrays().items()
        if not name.startswith("Transformer/encoderblock_")
    }
    blocks = [part(arrays(), f"Transformer/encoderblock_{i}") for i in range(DEPTH)]
    for name in blocks[0]:
        array = np.stack([block[name] for block in blocks])
        stacked[f"Transformer/encoderblock/{name}"] = array
    check(convert_big_vision(stacked), arrays(), "newer")


def test_sine_cosine_positions_are_theirs():
    """Columns first, then rows; wavelengths from 2π to 2π·10⁴ inclusive."""
    without = {n: a for n, a in arrays().items() if n != "pos_embedding"}
    with pytest.raises(ValueError, match="sine-cosine ones; give position_grid"):
        convert_big_vision(without)
    positions = np.zeros((3, 3, 8))
    for row, column in np.ndindex(3, 3):
        positions[row, column] = [
            *(
                np.sin(column),
                np.sin(column / 1e4),
                np.cos(column),
                np.cos(column / 1e4),
            ),
            *(np.sin(row), np.sin(row / 1e4), np.cos(row), np.cos(row / 1e4)),
        ]
    pretrained = convert_big_vision(without, position_grid=(3, 3))
    np.testing.assert_allclose(pretrained.params["positions"], positions, atol=1e-7)
    check(pretrained, without, "newer", positions)


def test_names_of_a_part_of_a_model_have_a_prefix(tmp_path):
    named = {f"params/img/{name}": array for name, array in arrays().items()}
    named |= {"params/txt/Embed_0/embedding": np.zeros((3, 2))}
    path = tmp_path / "model.npz"
    np.savez(path, **named)
    with pytest.raises(ValueError, match="names begin with params: give prefix"):
        load_big_vision(path)
    pretrained = load_big_vision(path, prefix="params/img/")
    check(pretrained, arrays(), "newer")


def test_bfloat16_arrays_are_widened(tmp_path):
    narrow = {n: a.astype(jnp.bfloat16) for n, a in arrays().items()}
    np.savez(tmp_path / "model.npz", **narrow)
    pretrained = load_big_vision(tmp_path / "model.npz")
    kernel = pretrained.params["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == np.float32
    expected = narrow["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"]
    np.testing.assert_array_equal(kernel, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"MAPHead_1/probe": (1, 1, 8)}, {}, "unmatched: MAPHead_1/probe"),
        ({"embedding/bias": None}, {}, "missing: embedding/bias"),
        ({"embedding/bias": (7,)}, {}, r"embedding/bias \(7, not 8\)"),
        ({"pos_embedding": (1, 12, 8)}, {}, "12 positions, which are no grid"),
        ({}, {"position_grid": (2, 3)}, "9 positions, which are no grid of .2, 3."),
    ],
)
def test_models_that_are_not_understood_are_refused(changes, arguments, message):
    changed = dict(arrays())
    for name, shape in changes.items():
        changed.pop(name, None)
        if shape is not None:
            changed[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        convert_big_vision(changed, **arguments)
