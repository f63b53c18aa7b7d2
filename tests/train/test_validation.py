"""Mistakes in an experiment that are found before it is run."""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Stripes, Tiles, experiment

from mtl_jax import optim
from mtl_jax.data import Component, Field, Mixture, dihedral, random_shift
from mtl_jax.layers.heads import Classification
from mtl_jax.layers.moe import MoE
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.models import VisionTransformer
from mtl_jax.tasks import accuracy, r2, squared_error
from mtl_jax.train import model_validation, validate, validation

GOOD = experiment()


def assert_refused(changed, expected):
    with pytest.raises(ValueError, match=expected):
        validate(changed)


def with_component(source="stripes", **fields):
    components = dict(GOOD.mixture.components)
    components[source] = dataclasses.replace(components[source], **fields)
    mixture = dataclasses.replace(GOOD.mixture, components=components)
    return dataclasses.replace(GOOD, mixture=mixture)


def with_task(name="direction", **fields):
    tasks = [
        dataclasses.replace(task, **fields) if task.name == name else task
        for task in GOOD.tasks
    ]
    return dataclasses.replace(GOOD, tasks=tuple(tasks))


def with_trunk(**fields):
    return dataclasses.replace(GOOD, trunk=GOOD.trunk.clone(**fields))


def test_a_good_experiment_passes():
    validate(GOOD)
    validate(with_component(augment=functools.partial(random_shift, max_shift=1)))
    validate(with_component("tiles", augment=dihedral))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tasks": 3}, "tasks is 3; it must be a Sequence"),
        ({"tasks": (None,)}, r"tasks\.0 is None; it must be a Task"),
        ({"trunk": VisionTransformer}, "trunk is .*; it must be a Module"),
        ({"trunk": None}, "trunk is None"),
        ({"mixture": {}}, "mixture is {}; it must be a Mixture"),
        ({"rules": None}, "rules is None; it must be a Rules"),
        ({"mesh": (1, 1, 1, 1)}, r"mesh is \(1, 1, 1, 1\); it must be a MeshShape"),
        ({"mixture": Mixture([], 16)}, r"mixture\.components is \[\]; .* a Mapping"),
        (
            {"mixture": Mixture({"tiles": Tiles()}, 16)},  # type: ignore[dict-item]
            r"mixture\.components\.tiles is Tiles.*; it must be a Component",
        ),
        (
            {"mixture": Mixture({"tiles": Component([], Tiles(), ())}, 16)},
            r"mixture\.components\.tiles\.train is \[\]; it must be a Source",
        ),
        ({"sharpness": 0.05}, "sharpness is a float; use fdl.Partial"),
        ({"initialize": "a.npz"}, "initialize is a str; use fdl.Partial"),
        ({"aggregator": optim.sum(4)}, "aggregator cannot be called with num_tasks"),
        (
            {"aggregator": functools.partial(optax.clip, 1.0)},
            "cannot be called with num_tasks .* clipping and the like belong behind it",
        ),
        ({"optimizer": optax.adam(1e-3)}, "optimizer cannot be called with num_steps"),
        (
            {"optimizer": functools.partial(optax.adam, 1e-3)},
            "optimizer cannot be called with num_steps .*; use fdl.Partial",
        ),
        ({"optimizer": lambda num_steps: num_steps}, "optimizer makes a int; it must"),
    ],
)
def test_a_field_of_the_wrong_kind(fields, expected):
    assert_refused(dataclasses.replace(GOOD, **fields), expected)


def test_a_config_of_something_else():
    assert_refused(GOOD.mixture, "the config makes a Mixture; it must make an mtl_jax")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"metrics": ()}, r"tasks\.direction\.metrics are \[\]; give at least one"),
        ({"metrics": (accuracy(), accuracy())}, "each with its own name"),
        (
            {"metrics": (dataclasses.replace(accuracy(), name="loss"),)},
            r"metrics are \['loss'\]; give",
        ),
        ({"metrics": (accuracy,)}, "it must be a Metric"),
        ({"head": Classification}, "head is .*; it must be a Module"),
        ({"loss": squared_error}, "loss of task 'direction' does not take predictions"),
        ({"metrics": (r2(),)}, "metric 'r2' of task 'direction' does not take"),
        ({"loss": lambda a, b, c: a}, r"does not take predictions float32 \(1, 2\)"),
        (
            {"loss": lambda prediction, target: (prediction, target)},
            r"returns shapes \(\(1, 2\), \(1,\)\) for targets of shape \(1,\)",
        ),
        (
            {"loss": lambda prediction, target: jnp.zeros(target.shape)},
            r"returns shapes \(1,\)",
        ),
    ],
)
def test_a_task_that_does_not_fit(fields, expected):
    assert_refused(with_task(**fields), expected)


def taller(record, rng):
    return record | {"image": np.zeros((9, 8, 1), np.uint8)}


def sometimes_taller(record, rng):
    return taller(record, rng) if rng.integers(2) else record


def in_floats(record, rng):
    return record | {"image": record["image"] / 255}


def without_labels(record, rng):
    return {"image": record["image"]}


def of_another_source(record, rng):
    return record | {"image": record["photo"]}


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        (taller, r"'image' of a record is uint8 \(9, 8, 1\), but its fields say uint8"),
        (sometimes_taller, r"is uint8 \(9, 8, 1\)"),
        (in_floats, r"is float64 \(8, 8, 1\), but its fields say uint8 \(8, 8, 1\)"),
        (without_labels, "field 'direction' of a record is absent"),
        (of_another_source, "fails on a record of that source: KeyError"),
        (lambda record: record, "fails on a record of that source: .* positional"),
        (dihedral, "fails on a record of that source"),
        (lambda record, rng: None, "must return a record"),
        (3, "fails on a record of that source: .*not callable"),
        (functools.partial(random_shift, max_shift=-1), "max_shift is -1; it must"),
        (functools.partial(random_shift, max_shift=8), "less than the sides"),
    ],
)
def test_an_augment_that_does_not_fit(augment, expected):
    where = r"mixture\.components\.stripes\.augment.*"
    assert_refused(with_component(augment=augment), where + expected)


@dataclasses.dataclass(frozen=True)
class Odd(Stripes):
    """Stripes with some field described wrongly."""

    field: str = "image"
    described: Field | None = None

    @property
    def fields(self):
        return super().fields | {self.field: self.described}


def test_records_that_are_not_as_described():
    grey = Odd(described=Field((8, 8), "uint8"))
    assert_refused(
        with_component(train=grey, test=grey),
        r"the train split of source 'stripes': field 'image' of a record is uint8 "
        r"\(8, 8, 1\), but its fields say uint8 \(8, 8\)",
    )
    floats = Odd(field="phase", described=Field((), "float32"))
    assert_refused(
        with_component(train=floats, test=floats),
        r"is int32 \(\), but its fields say f",
    )


def test_splits_that_differ():
    four = Odd(field="phase", described=Field((), "int32", 4))
    assert_refused(
        with_component(test=four), "field 'phase' of source 'stripes' differs between"
    )


def test_an_input_that_is_no_image():
    assert_refused(
        with_component(input_field="phase"),
        r"stripes\.input_field is 'phase', which has shape \(\); an input has height",
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight": -1.0}, r"stripes\.weight is -1\.0; it must be finite and at least"),
        ({"weight": float("nan")}, r"stripes\.weight is nan"),
        ({"tasks": ("phase", "direction", "phase")}, "name each task once"),
    ],
)
def test_a_component_that_does_not_fit(fields, expected):
    assert_refused(with_component(**fields), expected)


def test_a_source_that_labels_nothing():
    components = GOOD.mixture.components | {"more": Component(Tiles(), Tiles(), ())}
    mixture = dataclasses.replace(GOOD.mixture, components=components)
    assert_refused(
        dataclasses.replace(GOOD, mixture=mixture),
        r"mixture\.components\.more\.tasks is empty; .* or set its weight to 0",
    )
    components["more"] = Component(Tiles(), Tiles(), (), weight=0)
    mixture = dataclasses.replace(GOOD.mixture, components=components)
    validate(dataclasses.replace(GOOD, mixture=mixture))


def experts(**fields):
    defaults = {"num_experts": 4, "expert_hidden": 16, "group_size": 1}
    return functools.partial(MoE, **(defaults | fields))


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        (experts()(), "trunk.moe is a MoE; it must make one: use fdl.Partial"),
        (3, "trunk.moe is a int"),
        (lambda **_: 3, r"trunk\.moe\(\) is 3; it must be a Module"),
        (experts(num_tasks=4), "trunk.moe.num_tasks is 4, but the trunk gives its own"),
        (experts(dtype="float16"), "set trunk.dtype instead"),
        (
            experts(router=functools.partial(NoisyTopK, importance_weight=-1.0)),
            "trunk.moe.router.importance_weight is -1.0; it must be at",
        ),
        (
            experts(router=NoisyTopK(4, 2)),
            "trunk.moe.router is a NoisyTopK; it must make one: use fdl.Partial",
        ),
        (experts(num_selected=5), "num_selected is 5; it must be .* at most 4"),
    ],
)
def test_experts_that_do_not_fit(moe, expected):
    assert_refused(with_trunk(moe=moe), expected)


def test_a_loss_over_tasks_needs_routers_for_them():
    weighted = {"mutual_information_weight": 0.01}
    validate(dataclasses.replace(GOOD, **weighted))
    shared = dataclasses.replace(with_trunk(num_tasks=None), **weighted)
    assert_refused(shared, "mutual_information_weight is 0.01, but the trunk has no")
    negative = dataclasses.replace(GOOD, mutual_information_weight=-1.0)
    assert_refused(negative, "mutual_information_weight is -1.0; it must be at least")


class OwnTrunk(nn.Module):
    """A trunk of another making, whose sizes mean what they like."""

    width: str = "wide"

    @nn.compact
    def __call__(self, images, task=None, *, train=False):
        grey = images.astype(jnp.float32).mean(-1, keepdims=True)
        return nn.Conv(16, (4, 4), (4, 4))(grey)


def test_trunks_need_no_field():
    validate(dataclasses.replace(GOOD, trunk=OwnTrunk()))


def test_a_model_that_no_device_could_hold(monkeypatch):
    monkeypatch.setattr(model_validation, "_device_memory", lambda: 1000)
    assert_refused(GOOD, r"the model has \d[\d,]+ parameters, which take .* smaller")


def test_a_batch_that_no_machine_could_hold(monkeypatch):
    monkeypatch.setattr(model_validation, "_device_memory", lambda: 1e9)
    # A record of stripes has 64 bytes of image and two labels of 4.
    monkeypatch.setattr(validation, "host_memory", lambda: 16 * 72)
    validate(GOOD)
    monkeypatch.setattr(validation, "host_memory", lambda: 16 * 72 - 1)
    assert_refused(GOOD, "mixture.batch_size is 16; the records of such a batch take")
    smaller = dataclasses.replace(GOOD.mixture, batch_size=8)
    assert_refused(
        dataclasses.replace(GOOD, mixture=smaller), "evaluation_batch_size is 16; the"
    )


def test_the_memory_of_this_machine_is_known():
    # A machine that runs the tests has between a gigabyte and a petabyte.
    assert 1e9 < model_validation.host_memory() < 1e15
    assert 1e9 < model_validation._device_memory() < 1e15
