import functools
import json

import fiddle as fdl
import jax
import pytest

from mtl_jax import configuration, optim
from mtl_jax.train import Experiment, build_program, validate

TASKS = ("surface", "climate", "elevation", "log_slope", "digit", "left", "right")
METHODS = (
    *("sum", "mean", "random", "pcgrad", "gradvac", "mgda", "cagrad", "nash_mtl"),
    *("fairgrad", "imtl_g", "aligned_mtl", "upgrad", "dualproj", "conflict_free"),
    *("pcd", "ntkmtl", "gradnorm", "graddrop", "db_mtl", "moco", "excess_mtl"),
    *("trimmed_mean", "equal", "uncertainty", "uw_so", "dwa", "rlw", "gls"),
    *("scale_invariant", "imtl_l", "famo", "awl", "stch"),
)
VARIANTS = (
    "main",
    "shared_router",
    "dense",
    *("experts_4", "experts_16", "shared_router_4", "shared_router_16", "dropless"),
    *("switch", "expert_choice", "loss_free", "task_conditioned", "mod_squad"),
    *METHODS,
    "features",
    "sharpness",
    *(f"{name}_sharpness" for name in ("pcgrad", "cagrad", "mgda", "upgrad")),
    *(f"single_{task}" for task in TASKS),
)


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    """Optax's schedules mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def build(variant, smoke=False) -> Experiment:
    config = configuration.load_config(f"earth_digits:{variant}", smoke=smoke)
    return configuration.build(config)


def test_the_variants_are_those_that_are_documented():
    with pytest.raises(ValueError, match="no variant") as raised:
        configuration.load_config("earth_digits:none")
    listed = str(raised.value).partition("its variants are ")[2]
    assert tuple(listed.split(", ")) == VARIANTS


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_its_document(variant, smoke):
    config = configuration.load_config(f"earth_digits:{variant}", smoke=smoke)
    document = configuration.to_document(config, "earth_digits")
    saved = json.loads(json.dumps(document))
    assert configuration.from_document(saved) == config


# One of each kind: those of a kind differ in an aggregator or a task.
@pytest.mark.parametrize(
    "variant", ["main", "features", "dense", "pcgrad_sharpness", "single_climate"]
)
def test_variants_fit_together_on_eight_devices(variant):
    experiment = build(variant, smoke=True)
    validate(experiment)
    assert build_program(experiment).mesh.shape["expert"] == 4


def test_the_main_job_fits_together_at_its_full_size():
    validate(build("main"))
    program = build_program(build("main"))
    assert dict(program.mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "model": 1}


@pytest.mark.parametrize("name", METHODS)
def test_variants_by_method_differ_in_the_method_alone(name):
    config = configuration.load_config(f"earth_digits:{name}")
    assert fdl.get_callable(config.aggregator) is getattr(optim, name)
    config.aggregator = fdl.Partial(optim.sum)
    assert config == configuration.load_config("earth_digits")


@pytest.mark.parametrize("task", TASKS)
def test_a_single_task_gets_as_many_examples_and_updates_as_in_the_main_job(task):
    main, single = build("main"), build(f"single_{task}")
    assert [item.name for item in single.tasks] == [task]
    assert single.num_steps == main.num_steps
    ((source, tasks),) = single.labels.items()
    assert tasks == (task,)
    for devices in (1, 8):
        multiple = devices * main.group_size
        share = main.mixture.examples_per_batch(multiple)[source]
        assert single.mixture.examples_per_batch(multiple) == {source: share}


def test_routers_are_by_task_shared_or_absent():
    assert build("main").trunk.num_tasks == len(TASKS)
    assert build("shared_router").trunk.num_tasks is None
    assert build("shared_router").trunk.moe is not None
    assert build("dense").trunk.moe is None
    assert build("dense").trunk.num_tasks is None


def test_sharpness_and_features_are_what_they_say():
    assert build("sharpness").sharpness.func is optim.sharpness_aware
    assert build("features").gradients_at == "features"
    assert not build("features").model.task_conditioned


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_smoke_run_is_small(variant):
    experiment = build(variant, smoke=True)
    assert experiment.num_steps <= 4
    assert experiment.trunk.depth <= 2
