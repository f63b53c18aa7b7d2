import json
import shutil

import fiddle as fdl
import numpy as np
import pytest
from fixtures import FOLDER, expected, features

from mtl_jax.models.pretrained import (
    convert_clip,
    convert_deit,
    convert_dinov2,
    convert_vit,
    load_huggingface,
    read_arrays,
)

MODELS = {
    "vit": convert_vit,
    "vit_without_qkv_bias": convert_vit,
    "deit": convert_deit,
    "dinov2": convert_dinov2,
    "dinov2_gated": convert_dinov2,
    "dinov2_with_registers": convert_dinov2,
    "clip": convert_clip,
    "clip_with_text": convert_clip,
}


def load(name, **arguments):
    return load_huggingface(FOLDER / name, MODELS[name], **arguments)


# The second image has another grid, for which positions are resized.
@pytest.mark.parametrize("image", ["trained", "other"])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(name, image):
    golden = expected(name)
    actual = features(load(name), golden[f"{image}/images"], class_token="appended")
    width = actual.shape[-1] // 2
    np.testing.assert_allclose(
        actual[..., :width], golden[f"{image}/patches"], rtol=1e-5, atol=1e-5
    )
    classes = np.broadcast_to(
        golden[f"{image}/class"][:, None, None], actual[..., width:].shape
    )
    np.testing.assert_allclose(actual[..., width:], classes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_array_is_accounted_for(name):
    pretrained = load(name)
    arrays = read_arrays(FOLDER / name)
    named = {source for row in pretrained.rows for source in row.sources}
    assert named == set(arrays)
    ignored = [row for row in pretrained.rows if not row.parameter]
    parts = {source.partition(".")[0] for row in ignored for source in row.sources}
    assert parts == {
        "vit": {"pooler"},
        "vit_without_qkv_bias": {"classifier"},
        "deit": {"pooler"},
        "clip_with_text": {
            *("text_model", "text_projection", "visual_projection", "logit_scale"),
        },
    }.get(name, set()) | ({"embeddings"} if "dinov2" in name else set())


def test_the_table_tells_of_every_parameter_what_was_done():
    lines = load("vit").table().splitlines()
    assert len(lines) == len(load("vit").rows)
    table = {line.split()[0]: line.split()[1:] for line in lines}
    assert table["norm/scale"] == ["8", "layernorm.weight", "8"]
    assert table["block_1/mlp/up/kernel"] == [
        *("8x12", "encoder.layer.1.intermediate.dense.weight", "12x8", "transposed"),
    ]
    assert table["class_token"] == [
        *("1x8", "embeddings.cls_token", "1x1x8,", "embeddings.position_embeddings"),
        *("1x10x8", "with", "its", "position"),
    ]
    ignored = [line for line in lines if line.startswith("(ignored)")]
    assert [line.split()[1] for line in ignored] == [
        *("pooler.dense.bias", "pooler.dense.weight"),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_trunk_is_a_config_that_others_can_change(name):
    trunk = load(name).trunk
    assert isinstance(trunk, fdl.Config)
    trunk.dtype = "bfloat16"
    assert fdl.build(trunk).dtype == "bfloat16"


def change(name, folder, changes):
    """A copy of a model with other values in one of its JSON files."""
    copy = folder / name
    shutil.copytree(FOLDER / name, copy)
    for file, fields in changes.items():
        path = copy / file
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return copy


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vit", {"model_type": "deit"}, "type 'deit'; this family has vit: choose"),
        ("vit", {"hidden_act": "relu"}, "KeyError.'relu'.*hidden_act as one of gelu,"),
        ("vit", {"hidden_size": None}, "KeyError.'hidden_size'"),
        ("vit", {"patch_size": [2, 3]}, "patch_size .of a square."),
        ("vit", {"num_attention_heads": 3}, "3 heads share a width of 8"),
        (
            "vit",
            {"num_hidden_layers": 1},
            "unmatched: encoder.layer.1.attention.attention.key.bias, .*name in ignore",
        ),
        ("vit", {"num_hidden_layers": 3}, "missing: encoder.layer.2.layernorm_before"),
        (
            "vit",
            {"image_size": 8},
            r"other sizes: .*position_embeddings \(1x10x8, not 1x17x8\)",
        ),
        ("vit", {"qkv_bias": False}, "unmatched: .*attention.key.bias"),
        ("dinov2", {"use_swiglu_ffn": True}, "missing: .*mlp.weights_in.weight"),
        ("clip", {"intermediate_size": 16}, r"mlp.fc1.weight \(12x8, not 16x8\)"),
    ],
)
def test_sizes_that_are_not_those_of_the_arrays_are_refused(
    name, fields, message, tmp_path
):
    folder = change(name, tmp_path, {"config.json": fields})
    with pytest.raises(ValueError, match=message):
        load_huggingface(folder, MODELS[name])


def test_what_is_named_in_ignore_may_be_left_over(tmp_path):
    folder = change("vit", tmp_path, {"config.json": {"num_hidden_layers": 1}})
    pretrained = load_huggingface(folder, convert_vit, ignore=("encoder.layer.1.",))
    assert pretrained.trunk.depth == 1
    assert "block_1" not in pretrained.params


def test_sides_of_images_may_differ(tmp_path):
    fields = {"image_size": [2, 18], "patch_size": [2, 2]}
    folder = change("vit", tmp_path, {"config.json": fields})
    assert load_huggingface(folder, convert_vit).trunk.position_grid == (1, 9)


def test_pixels_are_normalised_as_the_preprocessor_says(tmp_path):
    embedding = load("dinov2").trunk.embedding
    assert embedding.mean == (0.485, 0.456, 0.406)
    assert embedding.std == (0.229, 0.224, 0.225)
    changes = {"preprocessor_config.json": {"do_normalize": False}}
    folder = change("dinov2", tmp_path, changes)
    embedding = load_huggingface(folder, convert_dinov2).trunk.embedding
    assert (embedding.mean, embedding.std) == ((0.0,), (1.0,))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="give mean and std, in units of pixels"):
        load_huggingface(folder, convert_dinov2)
    given = load_huggingface(folder, convert_dinov2, mean=(0.4,), std=(0.2,))
    assert (given.trunk.embedding.mean, given.trunk.embedding.std) == ((0.4,), (0.2,))
