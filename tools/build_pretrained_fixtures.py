"""Builds tests/models/pretrained/fixtures: tiny published models and their features.

    python tools/build_pretrained_fixtures.py

It needs PyTorch, transformers and timm, which the project does not depend on:
``pip install torch transformers timm``. Weights are random, so that the files are
nobody's but the project's; the names in them, and the features of two images, are what
those libraries make of the real classes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent.parent / "tests/models/pretrained/fixtures"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

Features = dict[str, np.ndarray]


def sizes(**others) -> dict:
    """Sizes that the transformers library's models have in common."""
    return {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "image_size": 6,
        "patch_size": 2,
    } | others


def dinov2_sizes(**others) -> dict:
    """The same for DINOv2, whose MLPs are a multiple of the width."""
    fields = sizes(mlp_ratio=2, **others)
    del fields["intermediate_size"]
    return fields


def huggingface() -> dict[str, tuple[torch.nn.Module, int, tuple]]:
    """Name -> model, its extra tokens, mean and deviation of its pixels."""
    t = transformers
    registers = dinov2_sizes(num_register_tokens=3)
    return {
        "vit": (t.ViTModel(t.ViTConfig(**sizes())), 1, HALF),
        "vit_without_qkv_bias": (
            t.ViTForImageClassification(
                t.ViTConfig(**sizes(qkv_bias=False, hidden_act="gelu_pytorch_tanh"))
            ),
            1,
            IMAGENET,
        ),
        "deit": (t.DeiTModel(t.DeiTConfig(**sizes())), 2, IMAGENET),
        "dinov2": (t.Dinov2Model(t.Dinov2Config(**dinov2_sizes())), 1, IMAGENET),
        "dinov2_gated": (
            t.Dinov2Model(t.Dinov2Config(**dinov2_sizes(use_swiglu_ffn=True))),
            1,
            IMAGENET,
        ),
        "dinov2_with_registers": (
            t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**registers)),
            4,
            IMAGENET,
        ),
        "clip": (t.CLIPVisionModel(t.CLIPVisionConfig(**sizes())), 1, OPENAI),
        "clip_with_text": (
            t.CLIPModel(
                t.CLIPConfig(
                    text_config={
                        "hidden_size": 4,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 2,
                        "intermediate_size": 4,
                        "vocab_size": 4,
                        "max_position_embeddings": 4,
                        "bos_token_id": 1,
                        "eos_token_id": 2,
                    },
                    vision_config=sizes(hidden_act="gelu"),
                    projection_dim=4,
                )
            ),
            1,
            OPENAI,
        ),
    }


def timm_models() -> dict[str, tuple[torch.nn.Module, int, tuple]]:
    """The same for timm."""
    fields = {
        "img_size": 6,
        "patch_size": 2,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 1.5,
        "num_classes": 2,
        "dynamic_img_size": True,
    }

    def make(name: str, **others):
        return timm.create_model(name, **(fields | others))

    return {
        "timm_vit": (make("vit_tiny_patch16_224"), 1, HALF),
        "timm_averaged": (
            make(
                "vit_tiny_patch16_224",
                class_token=False,
                global_pool="avg",
                fc_norm=True,
                qkv_bias=False,
            ),
            0,
            HALF,
        ),
        "timm_deit_distilled": (make("deit_tiny_distilled_patch16_224"), 2, IMAGENET),
        "timm_dinov2": (make("vit_small_patch14_reg4_dinov2"), 5, IMAGENET),
        "timm_dinov2_gated": (
            make(
                "vit_giant_patch14_dinov2",
                # Twice the hidden units, as gates have a half of them.
                mlp_ratio=4,
                depth=1,
            ),
            1,
            IMAGENET,
        ),
        "timm_clip": (make("vit_base_patch16_clip_quickgelu_224"), 1, OPENAI),
    }


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter with random numbers: fresh ones are zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Rounded, so that files are small when they are compressed.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((0.4 * noise).to(torch.float16))
    model.eval()


def images(*shape: int) -> np.ndarray:
    """Random images, as bytes."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def as_pixels(batch: np.ndarray, mean: tuple, std: tuple) -> torch.Tensor:
    """Bytes as the models take them."""
    pixels = (batch / 255 - np.array(mean)) / np.array(std)
    return torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)


def split(tokens: torch.Tensor, num_extra: int, rows: int) -> Features:
    """Features of the patches in their grid, and of the class token if there is one."""
    array = tokens.detach().numpy()
    batch, _, width = array.shape
    features = {"patches": array[:, num_extra:].reshape(batch, rows, -1, width)}
    return features | ({"class": array[:, 0]} if num_extra else {})


def huggingface_tokens(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """All tokens behind the last norm."""
    trunk = getattr(model, "vision_model", getattr(model, "vit", model))
    # DINOv2 resizes its positions without being told.
    told = not model.config.model_type.startswith("dinov2")
    with torch.no_grad():
        output = trunk(pixels, **({"interpolate_pos_encoding": True} if told else {}))
        tokens = output.last_hidden_state
        # CLIP has it on the class token alone.
        last = getattr(trunk, "post_layernorm", torch.nn.Identity())
        return last(tokens)


def timm_tokens(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """All tokens behind the last norm."""
    with torch.no_grad():
        return model.forward_features(pixels)


def expected(
    model: torch.nn.Module,
    num_extra: int,
    normalisation: tuple,
    tokens: Callable,
    shapes: dict[str, tuple[int, ...]],
) -> Features:
    """Name -> images of each shape, and their features."""
    result = {}
    for name, shape in shapes.items():
        batch = images(*shape)
        pixels = as_pixels(batch, *normalisation)
        found = split(tokens(model, pixels), num_extra, shape[1] // 2)
        result[f"{name}/images"] = batch
        # Files hold arrays as they lie in memory.
        result |= {
            f"{name}/{part}": np.ascontiguousarray(array)
            for part, array in found.items()
        }
    return result


def main() -> None:
    """Writes a folder for each model."""
    shapes = {"trained": (2, 6, 6, 3), "other": (1, 4, 10, 3)}
    for seed, (name, (model, num_extra, normalisation)) in enumerate(
        huggingface().items()
    ):
        folder = FOLDER / name
        randomise(model, seed)
        model.save_pretrained(folder)
        mean, std = normalisation
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": mean, "image_std": std}) + "\n"
        )
        save_file(
            expected(model, num_extra, normalisation, huggingface_tokens, shapes),
            folder / "expected.safetensors",
        )
    for seed, (name, (model, num_extra, normalisation)) in enumerate(
        timm_models().items()
    ):
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        randomise(model, seed)
        arrays = {n: array.numpy() for n, array in model.state_dict().items()}
        save_file(arrays, folder / "model.safetensors")
        mean, std = normalisation
        (folder / "config.json").write_text(
            json.dumps({"pretrained_cfg": {"mean": mean, "std": std}}) + "\n"
        )
        save_file(
            expected(model, num_extra, normalisation, timm_tokens, shapes),
            folder / "expected.safetensors",
        )


if __name__ == "__main__":
    main()
