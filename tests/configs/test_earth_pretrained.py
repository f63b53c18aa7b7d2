import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mtl_jax import cli, configuration
from mtl_jax.models.pretrained import convert_vit, load_huggingface
from mtl_jax.models.pretrained.huggingface import read_sizes, trunk_config
from mtl_jax.train import build_program, check_initialize, validate

FIXTURE = Path(__file__).parents[1] / "models/pretrained/fixtures/vit"

# What facebook/dino-vits8 has in its config.json and preprocessor_config.json.
DINO = {
    "model_type": "vit",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 8,
    "num_channels": 3,
    "qkv_bias": True,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    """Optax's schedules mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def load(variant="main", **arguments):
    return configuration.load_config(f"earth_pretrained:{variant}", **arguments)


def test_the_trunk_is_the_published_one():
    expected = trunk_config(read_sizes(DINO, "vit"), MEAN, STD)
    assert load().trunk == expected


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("variant", ["main", "fresh"])
def test_every_variant_survives_its_document(variant, smoke):
    config = load(variant, smoke=smoke)
    saved = json.loads(json.dumps(configuration.to_document(config, "a")))
    assert configuration.from_document(saved) == config


def test_a_smoke_run_needs_no_file():
    config = load(smoke=True)
    assert config.initialize is None
    validate(configuration.build(config))


def test_a_run_starts_from_a_file_sharded():
    config = load(smoke=True)
    config.trunk = load_huggingface(FIXTURE, convert_vit).trunk
    config.tasks = config.tasks[:1]
    config.tasks[0].head.patch_size = 2
    config.mixture.components["earth"].tasks = ("surface",)
    config.initialize = load().initialize
    config.mesh.data, config.mesh.fsdp, config.mesh.model = 2, 2, 2
    configuration.override(config, [f"initialize.load.path={FIXTURE}"])
    experiment = configuration.build(config)
    program = build_program(experiment)
    check_initialize(experiment.initialize, program.abstract_params())
    params = program.init_state().params
    kernel = params["trunk"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 6)
    golden = load_file(FIXTURE / "expected.safetensors")
    with program.scope():
        features = jax.jit(
            lambda params, images: experiment.trunk.apply({"params": params}, images)
        )(params["trunk"], golden["other/images"])
    np.testing.assert_allclose(features, golden["other/patches"], rtol=1e-5, atol=1e-5)


def test_a_missing_file_is_one_line_and_leaves_no_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["--set", f"initialize.load.path={tmp_path}/none"]
    arguments += ["--set", "trunk.depth=1"]
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["train", "earth_pretrained", "--workdir", str(folder), *arguments])
    assert exit_status.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "error: initialize: " in line
    assert "none does not exist; give a .safetensors or .npz file" in line
    assert not folder.exists()
