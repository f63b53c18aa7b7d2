from pathlib import Path

import numpy as np
import pytest

from mtl_jax.report.routing import colored_patches, expert_colors, routed_images
from mtl_jax.report.run_folder import Run

EXPERTS = np.arange(16).reshape(1, 4, 4) % 5


def run_with(samples):
    image = np.full((1, 8, 8, 1), 255, np.uint8)
    return Run(
        path=Path("run"),
        config_fields={},
        result={"sources": {"earth": {}, "digits": {}}, "tasks": {"climate": {}}},
        records=(),
        timings=(),
        samples={"earth/image": image, **samples},
    )


def test_each_source_with_routed_patches_has_its_images():
    run = run_with(
        {
            "earth/routing/climate/block_1": EXPERTS,
            "earth/routing/climate/block_3": np.zeros_like(EXPERTS),
            "earth/climate/target": np.zeros((1, 8, 8)),
        }
    )
    ((source, (image,)),) = routed_images(run)
    assert source == "earth"
    # Experts 0 to 4 have 4, 3, 3, 3 and 3 of 16 patches.
    assert "climate in block_1: 5 experts, most patches (25%) to 0;" in image.alt
    assert "climate in block_3: 1 experts, most patches (100%) to 0." in image.alt


def test_patches_have_the_colours_of_their_experts():
    colors = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, 3:] = 255
    pixels = colored_patches(image, np.array([[0, 1, 1], [1, 0, 0]]), colors)
    np.testing.assert_allclose(pixels[0, 0], [0.72, 0, 0])
    np.testing.assert_allclose(pixels[1, 2], [0, 0, 0.72])
    np.testing.assert_allclose(pixels[2, 5], [1.0, 0.28, 0.28])


def test_a_run_without_routing_has_none():
    assert routed_images(run_with({})) == []


@pytest.mark.parametrize("number", [1, 7, 8, 16, 20, 64])
def test_experts_have_colours_of_their_own(number):
    colors = expert_colors(number)
    assert colors.shape == (number, 3)
    distance = np.abs(colors[:, None] - colors[None]).max(-1) + np.eye(number)
    assert distance.min() > 0.02


@pytest.mark.parametrize(
    "experts",
    [EXPERTS[0], EXPERTS - 1, EXPERTS.astype(float), np.repeat(EXPERTS, 2, axis=0)],
    ids=["axes", "negative", "floats", "examples"],
)
def test_damaged_routing_is_explained(experts):
    run = run_with({"earth/routing/climate/block_1": experts})
    with pytest.raises(ValueError, match=r"'earth/routing/climate/block_1' is .* it m"):
        routed_images(run)
