"""The vision transformers of every size: what they are, how they are sharded, and what
travels between chips, compiled for slices that are not there."""

import functools
import json
import platform
import sys

import jax
import pytest

from mtl_jax import configuration, scaling, sharding
from mtl_jax.scaling.collectives import find_collectives
from mtl_jax.scaling.hlo import parse
from mtl_jax.train import build_program, validate
from mtl_jax.train.program import count_parameters

# Variant -> its slice, mesh without `model`, millions of parameters, and the digest of
# its sharding report there.
VARIANTS = {
    "tiny_6m": ("v5e:2x4", (2, 1, 4), 5.88, "9d39c58ff2ccfed4"),
    "small_72m": ("v5e:4x4", (2, 1, 8), 72, "66d0734d7673b44e"),
    "base_1b": ("v5e:8x8", (8, 1, 8), 965, "0b84c52fffe15fdf"),
    "large_3b": ("v5e:16x16", (4, 4, 16), 3428, "caad688341067413"),
    "giant_21b": ("v5p:8x8x8", (8, 8, 8), 20_947, "d5d2833db4f62891"),
    "huge_100b": ("v5p:8x8x16", (8, 8, 16), 100_350, "13b1e0469997bf68"),
}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="libtpu is made for Linux on x86-64 alone",
)


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    """Optax's schedules mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    scaling.prepare_environment()
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)


def load(variant, *assignments):
    config = configuration.load_config(f"vision_moe:{variant}")
    configuration.override(config, assignments)
    return configuration.build(config)


@functools.cache
def program(variant):
    topology = scaling.make_topology(VARIANTS[variant][0])
    return build_program(load(variant), topology.devices)


def test_the_variants_are_those_that_are_documented():
    with pytest.raises(ValueError, match="no variant") as raised:
        configuration.load_config("vision_moe:none")
    listed = str(raised.value).partition("its variants are ")[2]
    assert listed.split(", ") == [*VARIANTS]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_meshes_and_sharding(variant):
    _, mesh, millions, digest = VARIANTS[variant]
    built = program(variant)
    assert tuple(built.mesh.shape.values()) == (*mesh, 1)
    total, active = count_parameters(built)
    assert total / 1e6 == pytest.approx(millions, rel=0.005)
    assert active < total
    rows = sharding.report(
        built.abstract_state.params, built.mesh, built.experiment.rules
    )
    assert sharding.digest(rows) == digest
    # Experts are split over fsdp and expert, nearly all else over fsdp.
    held = sum(row.bytes_per_device for row in rows)
    experts = sum(row.total_bytes for row in rows if "experts" in row.path)
    rest = sum(row.total_bytes for row in rows) - experts
    _, fsdp, expert = mesh
    assert held <= 1.05 * (experts / (fsdp * expert) + rest / fsdp)


def test_the_smallest_variant_is_valid_and_survives_its_document():
    validate(load("tiny_6m"))
    config = configuration.load_config("vision_moe:huge_100b")
    document = configuration.to_document(config, "vision_moe:huge_100b")
    assert configuration.from_document(json.loads(json.dumps(document))) == config


def test_a_smoke_run_is_small():
    config = configuration.load_config("vision_moe:huge_100b", smoke=True)
    experiment = configuration.build(config)
    validate(experiment)
    assert build_program(experiment).mesh.shape["data"] == 8
    assert experiment.num_steps <= 4


# Tokens to experts and back; gradients of experts over data, of all else over both.
WITHOUT_FSDP = {
    ("all-to-all", "expert"),
    ("all-reduce", "data"),
    ("all-reduce", "data+expert"),
}
# Parameters are gathered over fsdp, their gradients scattered.
WITH_FSDP = WITHOUT_FSDP | {
    ("all-gather", "fsdp"),
    ("reduce-scatter", "fsdp"),
    ("all-reduce", "data+fsdp"),
    ("all-reduce", "data+fsdp+expert"),
}
TRAVELLING = {
    "tiny_6m": WITHOUT_FSDP,
    "small_72m": WITHOUT_FSDP,
    "base_1b": WITHOUT_FSDP,
    # Where the compiler scatters a gradient in padded shares, chips pass on the rows
    # that belong to the next.
    "large_3b": WITH_FSDP | {("collective-permute", "fsdp")},
    # Here it sums the gradients of attention's kernels instead, for shares of the sums.
    "giant_21b": WITH_FSDP | {("collective-permute", "fsdp"), ("all-reduce", "fsdp")},
    "huge_100b": WITH_FSDP,
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", TRAVELLING)
def test_what_travels_on_the_whole_slice(variant):
    """The whole step: kinds of collectives and the mesh axes that they run over."""
    built = program(variant)
    compiled, _ = built.compile_step()
    found = find_collectives(parse(compiled.as_text()), built.mesh.shape)
    # Scalars, and numbers of every expert or task, are left out.
    kinds = {(item.kind, "+".join(item.axes)) for item in found if item.bytes > 4096}
    assert kinds == TRAVELLING[variant]
    # What the compiler gives a chip to hold: its shares of the parameters, and of two
    # moments of each, and three bytes and four labels of every pixel. Tiles are padded.
    rows = sharding.report(
        built.abstract_state.params, built.mesh, built.experiment.rules
    )
    assert sharding.digest(rows) == VARIANTS[variant][3]
    state = 3 * sum(row.bytes_per_device for row in rows)
    examples = built.experiment.mixture.batch_size // built.mesh.size
    batch = examples * 224 * 224 * (3 + 4 * 4)
    held = compiled.memory_analysis().argument_size_in_bytes
    assert 1 <= held / (state + batch) < 1.06


@pytest.mark.slow
def test_a_looped_trunk_sends_as_many_tokens_as_an_unrolled_one():
    """Trip counts of loops, which TPU programs do not state, checked without loops."""
    topology = scaling.make_topology("v5e:2x4")
    sizes = ("trunk.depth=6", "mixture.batch_size=32", "evaluation_batch_size=32")
    looped, unrolled = (
        scaling.estimate(
            load("tiny_6m", *sizes, f"trunk.scan={scan}"), topology, optimized=False
        )
        for scan in (True, False)
    )

    def bytes_by_kind(found):
        return {
            (item.kind, item.axes): item.bytes
            for item in found.collectives
            if item.bytes > 4096
        }

    # A few numbers of four bytes travel along with others or by themselves.
    assert bytes_by_kind(looped) == pytest.approx(bytes_by_kind(unrolled), abs=64)
    tokens = [
        {item.kind: item.count for item in found.collectives}["all-to-all"]
        for found in (looped, unrolled)
    ]
    # Three blocks of experts: there and back, forward, recomputed and backward.
    assert tokens == [18, 18]
    assert looped.chip_flops == pytest.approx(unrolled.chip_flops, rel=0.01)
    assert looped.memory_bytes == pytest.approx(unrolled.memory_bytes, rel=0.05)
