"""Against the libraries themselves, where they are installed.

    pip install torch transformers timm
    pytest tests/models/pretrained/test_peers.py

The other tests here compare with features that these libraries gave once; these ones
make models of other sizes anew, by whatever release is installed.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from fixtures import features

from mtl_jax.layers.mlp import quick_gelu
from mtl_jax.models.pretrained import (
    convert_clip,
    convert_deit,
    convert_dinov2,
    convert_timm,
    convert_vit,
    load_huggingface,
)

pytestmark = [
    pytest.mark.optional,
    # Peers warn of what is theirs.
    pytest.mark.filterwarnings("default"),
]
for peer in ("torch", "transformers", "timm"):
    pytest.importorskip(peer, reason="an optional peer, which no extra installs")

PATH = Path(__file__).parents[3] / "tools/build_pretrained_fixtures.py"
SPECIFICATION = importlib.util.spec_from_file_location("build_fixtures", PATH)
build = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(build)

LARGER = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
LARGER |= {"intermediate_size": 40, "image_size": 20, "patch_size": 4}
FAMILIES = {
    "vit": convert_vit,
    "deit": convert_deit,
    "dinov2": convert_dinov2,
    "clip": convert_clip,
}


def compare(ours, theirs, num_extra, image):
    golden = build.split(theirs, num_extra, image.shape[1] // 4)
    width = golden["patches"].shape[-1]
    np.testing.assert_allclose(
        ours[..., :width], golden["patches"], rtol=1e-5, atol=1e-5
    )
    if num_extra:
        classes = np.broadcast_to(
            golden["class"][:, None, None], golden["patches"].shape
        )
        np.testing.assert_allclose(ours[..., width:], classes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 20, 20, 3), (1, 12, 28, 3)], ids=str)
@pytest.mark.parametrize("name", build.huggingface())
def test_transformers(name, shape, tmp_path, monkeypatch):
    sizes = build.sizes
    monkeypatch.setattr(build, "sizes", lambda **others: sizes(**(LARGER | others)))
    model, num_extra, normalisation = build.huggingface()[name]
    build.randomise(model, seed=17)
    model.save_pretrained(tmp_path)
    convert = FAMILIES[name.partition("_")[0]]
    mean, std = normalisation
    pretrained = load_huggingface(tmp_path, convert, mean=mean, std=std)
    image = build.images(*shape)
    theirs = build.huggingface_tokens(model, build.as_pixels(image, *normalisation))
    ours = features(pretrained, image, class_token="appended")
    compare(ours, theirs, num_extra, image)


TIMM = {
    "vit_small_patch16_224": {},
    "vit_base_patch8_224.dino": {},
    "vit_base_patch16_siglip_224": {},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_dinov2": {},
    "vit_base_patch14_reg4_dinov2": {},
    "vit_giant_patch14_reg4_dinov2": {"mlp_ratio": 4.0},
    "vit_base_patch16_clip_224": {"epsilon": 1e-5},
    "vit_base_patch16_clip_quickgelu_224": {"epsilon": 1e-5, "activation": quick_gelu},
}


@pytest.mark.parametrize("shape", [(2, 20, 20, 3), (1, 12, 28, 3)], ids=str)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, shape):
    fields = {"img_size": 20, "patch_size": 4, "embed_dim": 24, "depth": 3}
    fields |= {"num_heads": 3, "dynamic_img_size": True}
    others = dict(TIMM[name])
    epsilon = others.pop("epsilon", 1e-6)
    arguments = (
        {"activation": others.pop("activation")} if "activation" in others else {}
    )
    model = build.timm.create_model(name.partition(".")[0], **(fields | others))
    build.randomise(model, seed=5)
    arrays = {n: array.numpy() for n, array in model.state_dict().items()}
    mean, std = build.IMAGENET
    pretrained = convert_timm(
        arrays,
        num_heads=3,
        mean=mean,
        std=std,
        norm_epsilon=epsilon,
        **arguments,
    )
    image = build.images(*shape)
    theirs = build.timm_tokens(model, build.as_pixels(image, mean, std))
    num_extra = model.num_prefix_tokens
    fields = {"class_token": "appended"} if num_extra else {}
    compare(features(pretrained, image, **fields), theirs, num_extra, image)
