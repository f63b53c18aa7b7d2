import shutil

import numpy as np
import pytest
from fixtures import FOLDER, expected, features

from mtl_jax.layers.mlp import quick_gelu
from mtl_jax.models.pretrained import convert_timm, load_timm, read_arrays

MODELS = {
    "timm_vit": {},
    "timm_averaged": {"position_grid": (3, 3)},
    "timm_deit_distilled": {},
    # Nine positions could be those of a grid of 3x3, or of 2x2 and five extra tokens.
    "timm_dinov2": {"position_grid": (3, 3)},
    "timm_dinov2_gated": {},
    "timm_clip": {"activation": quick_gelu, "norm_epsilon": 1e-5},
}


def load(name):
    return load_timm(FOLDER / name, num_heads=2, **MODELS[name])


def convert(arrays, **arguments):
    return convert_timm(
        arrays, **({"num_heads": 2, "mean": (0.5,), "std": (0.5,)} | arguments)
    )


# The second image has another grid, for which positions are resized.
@pytest.mark.parametrize("image", ["trained", "other"])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_timm(name, image):
    golden = expected(name)
    fields = {} if name == "timm_averaged" else {"class_token": "appended"}
    actual = features(load(name), golden[f"{image}/images"], **fields)
    patches = golden[f"{image}/patches"]
    width = patches.shape[-1]
    np.testing.assert_allclose(actual[..., :width], patches, rtol=1e-5, atol=1e-5)
    assert actual.shape[-1] == width * (1 + bool(fields))
    if fields:
        classes = golden[f"{image}/class"][:, None, None]
        classes = np.broadcast_to(classes, patches.shape)
        np.testing.assert_allclose(actual[..., width:], classes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_array_is_accounted_for(name):
    named = {source for row in load(name).rows for source in row.sources}
    assert named == set(read_arrays(FOLDER / name))


def test_fields_are_those_of_the_arrays():
    clip = load("timm_clip").trunk
    assert clip.pre_norm
    assert not clip.embedding.use_bias
    assert clip.embedding.std == (0.26862954, 0.26130258, 0.27577711)
    registers = load("timm_dinov2").trunk
    assert (registers.num_registers, registers.layer_scale) == (4, 1.0)
    averaged = load("timm_averaged").trunk
    assert averaged.class_token == "absent"
    assert not averaged.final_norm
    assert not averaged.attention.qkv_bias
    assert averaged.attention.output_bias
    assert load("timm_deit_distilled").trunk.num_registers == 1


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"num_heads": 3}, "num_heads is 3, which does not divide the width 8"),
        ({}, {"position_grid": (2, 3)}, "10 positions for 1 extra tokens .*2, 3"),
        ({"patch_embed.proj.weight": None}, {}, "no array patch_embed.proj.weight"),
        ({"blocks.0.attn.q_norm.weight": (4,)}, {}, "unmatched: .*attn.q_norm.weight"),
        ({"blocks.1.norm1.bias": None}, {}, "missing: blocks.1.norm1.bias"),
        ({"pos_embed": (1, 12, 8)}, {}, "pos_embed has 12 positions"),
    ],
)
def test_models_that_are_not_understood_are_refused(change, arguments, message):
    arrays = read_arrays(FOLDER / "timm_vit")
    for name, shape in change.items():
        arrays.pop(name, None)
        if shape is not None:
            arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        convert(arrays, **arguments)


def test_positions_may_be_of_a_grid_that_is_no_square():
    arrays = read_arrays(FOLDER / "timm_vit")
    pretrained = convert(arrays, position_grid=(1, 9))
    positions = arrays["pos_embed"][0, 1:].reshape(1, 9, 8)
    np.testing.assert_array_equal(pretrained.params["positions"], positions)


def test_how_pixels_are_normalised_is_not_guessed(tmp_path):
    shutil.copy(FOLDER / "timm_vit/model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="give mean and std, in units of pixels"):
        load_timm(tmp_path, num_heads=2)
    given = load_timm(
        tmp_path / "model.safetensors", num_heads=2, mean=(0.4,), std=(0.2,)
    )
    assert given.trunk.embedding.mean == (0.4,)
