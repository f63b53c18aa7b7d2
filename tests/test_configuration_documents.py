"""Configs as JSON: rebuilt, compared, and refused where they are hostile."""

import copy
import dataclasses
import functools
import importlib.util
import json
import sys

import fiddle as fdl
import jax
import pytest

from mtl_jax.configuration import (
    differences,
    from_document,
    load_config,
    override,
    to_document,
)
from mtl_jax.layers.moe import MoE


def config():
    return load_config("earth_digits", smoke=True)


def changed(*assignments):
    result = config()
    override(result, assignments)
    return result


def document(*assignments):
    # As it is after it was written and read.
    return json.loads(json.dumps(to_document(changed(*assignments), "earth_digits")))


@pytest.mark.parametrize(
    "assignments",
    [
        (),
        ("trunk.moe=None", "trunk.num_tasks=None", "seed=5"),
        ("optimizer.max_norm=None", "rules.embed=('data','model')"),
        ("trunk.dtype=bfloat16",),
    ],
)
def test_a_document_rebuilds_its_config(assignments):
    rebuilt = from_document(document(*assignments))
    assert rebuilt == changed(*assignments)
    assert to_document(rebuilt, "earth_digits") == document(*assignments)


def test_a_dtype_survives_the_document():
    original = config()
    original.trunk.dtype = jax.numpy.bfloat16
    saved = json.loads(json.dumps(to_document(original, "earth_digits")))
    assert from_document(saved).trunk.dtype is jax.numpy.bfloat16


def test_a_rebuilt_config_builds_an_equal_experiment():
    ours = fdl.build(config())
    theirs = fdl.build(from_document(document()))
    # Metrics hold functions made anew, which are never equal.
    assert theirs.trunk.clone(moe=None) == ours.trunk.clone(moe=None)
    assert isinstance(theirs.trunk.moe, functools.partial)
    assert theirs.trunk.moe.func is MoE
    theirs_moe, ours_moe = theirs.trunk.moe(), ours.trunk.moe()
    # So are partials.
    assert theirs_moe.clone(router=None) == ours_moe.clone(router=None)
    assert theirs_moe.router.func is ours_moe.router.func
    assert theirs_moe.router.keywords == ours_moe.router.keywords
    assert theirs.mixture.batch_size == ours.mixture.batch_size
    assert (theirs.rules, theirs.mesh) == (ours.rules, ours.mesh)
    for ours_task, theirs_task in zip(ours.tasks, theirs.tasks, strict=True):
        assert theirs_task.name == ours_task.name
        assert theirs_task.head == ours_task.head
        assert theirs_task.loss is ours_task.loss


def test_fields_hold_defaults_and_name_what_is_configured():
    fields = document()["fields"]
    assert fields["gradients_at"] == "params"
    assert fields["trunk"] == "mtl_jax.models.vit.VisionTransformer"
    assert fields["trunk.moe.num_experts"] == 8
    assert fields["trunk.moe.capacity_factor"] == 1.25
    assert fields["tasks.surface.head.num_classes"] == 2
    assert fields["mixture.components.earth.augment"].endswith(".dihedral")
    assert fields["mixture.components.earth.tasks"][0] == "surface"


@pytest.mark.parametrize("variant", ["loss_free", "expert_choice"])
def test_defaults_read_the_same_in_every_process(variant):
    name = f"earth_digits:{variant}"
    fields = to_document(load_config(name), name)["fields"]
    assert "0x" not in json.dumps(fields)
    assert fields["trunk.moe.router.gate"].startswith("mtl_jax.layers.moe.gates.Gate(")


def test_differences_name_every_field_that_differs():
    assert differences(document(), document()) == []
    assert differences(document(), document("seed=5", "trunk.width=48")) == [
        "seed: 0 -> 5",
        "trunk.width: 24 -> 48",
    ]
    lines = differences(document(), document("trunk.moe=None"))
    assert "trunk.moe.num_experts: 8 -> '(unset)'" in lines
    assert "seed: '(unset)' -> 0" in differences({"fields": [1]}, document())


def names_used(node):
    """Every place where a saved config names a symbol."""
    if isinstance(node, dict):
        if node.get("type") == "pyref":
            yield node
        for item in node.values():
            yield from names_used(item)
    elif isinstance(node, list):
        for item in node:
            yield from names_used(item)


HOSTILE = [
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "run"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "__import__"),
    ("builtins", "getattr"),
    ("builtins", "open"),
    ("pickle", "loads"),
    ("numpy", "load"),
    ("fiddle", "build"),
    ("importlib", "import_module"),
    ("antigravity", "fly"),
    ("mtl_jax.data.builders", "prepare"),
    ("mtl_jax.train.run_folder", "RunFolder"),
    ("mtl_jax.train.experiment", "Experiment.__init__"),
    ("mtl_jaxx", "train"),
    ("mtl_jax.cli", "main"),
    ("mtl_jax", "cli.main"),
    ("mtl_jax.configuration", "load_config"),
    # What trusted modules import from others.
    ("mtl_jax.train.run_folder", "os"),
    ("mtl_jax.train.run_folder", "os.system"),
    ("mtl_jax.train.run_folder", "Path"),
    ("mtl_jax.train.loop", "sys.exit"),
    ("mtl_jax.train", "RunFolder.__init__.__globals__"),
    ("mtl_jax.train", "RunFolder.__class__"),
    ("jax.numpy", "load"),
    ("jax.numpy", "save"),
    ("jax.numpy", "fromfile"),
]


@pytest.mark.parametrize(("module", "symbol"), HOSTILE, ids=str)
def test_a_hostile_config_is_refused_before_it_is_built(module, symbol, monkeypatch):
    imported = set(sys.modules)
    monkeypatch.setattr(fdl, "build", None)
    for target in ("os.system", "os.fork"):
        monkeypatch.setattr(target, lambda *_: pytest.fail("called"))
    hostile = document()
    for place in names_used(hostile["fiddle"]):
        if place["name"] == "DensePrediction":
            place.update(module=module, name=symbol)
    with pytest.raises(ValueError, match="not in a trusted module"):
        from_document(hostile)
    new = {name.partition(".")[0] for name in set(sys.modules) - imported}
    assert not new & {"antigravity", "mtl_jaxx"}


def test_every_name_of_a_document_is_guarded():
    original = document()
    names = {(use["module"], use["name"]) for use in names_used(original["fiddle"])}
    for module, name in names:
        hostile = copy.deepcopy(original)
        for use in names_used(hostile["fiddle"]):
            if (use["module"], use["name"]) == (module, name):
                use.update(module="os", name="system")
        with pytest.raises(ValueError, match=r"os\.system"):
            from_document(hostile)


def test_a_package_of_one_s_own_needs_trust(tmp_path, monkeypatch):
    (tmp_path / "own_heads.py").write_text(
        "import flax.linen as nn\n"
        "class Own(nn.Module):\n"
        "    patch_size: int\n"
        "    num_classes: int | None = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    saved = document()
    for place in names_used(saved["fiddle"]):
        if place["name"] == "DensePrediction":
            place.update(module="own_heads", name="Own")
    with pytest.raises(ValueError, match="add --trust own_heads"):
        from_document(saved)
    assert "own_heads" not in sys.modules
    rebuilt = from_document(saved, trust=["own_heads"])
    assert fdl.get_callable(rebuilt.tasks[0].head).__name__ == "Own"
    monkeypatch.delitem(sys.modules, "own_heads")


def test_a_file_of_one_s_own_can_be_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "own_losses.py"
    file.write_text("def loss(prediction, target):\n    return prediction, target\n")
    saved = document()
    for place in names_used(saved["fiddle"]):
        if place["name"] == "softmax_cross_entropy":
            place.update(module="own_losses", name="loss")
    with pytest.raises(ValueError, match=r"--trust the path of its file, .*own_losses"):
        from_document(saved, trust=["own_losses"])
    with pytest.raises(ValueError, match=r"--trust no\.py: there is no such file"):
        from_document(saved, trust=["no.py"])
    importlib.invalidate_caches()
    rebuilt = from_document(saved, trust=[str(file)])
    assert rebuilt.tasks[0].loss.__module__ == "own_losses"
    monkeypatch.delitem(sys.modules, "own_losses")


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"fiddle": None},
        {"fiddle": []},
        {"fiddle": {}},
        {"fiddle": {"root": 3}},
        {"fiddle": {**document()["fiddle"], "objects": {}}},
        {"fiddle": {**document()["fiddle"], "root": {"type": "no_such_type"}}},
        {"fiddle": {**document()["fiddle"], "root": [[[]]]}},
    ],
)
def test_a_damaged_document_is_refused(damaged):
    with pytest.raises(ValueError, match=r"config\.json"):
        from_document(damaged)


@dataclasses.dataclass(frozen=True)
class _WithFactory:
    names: list = dataclasses.field(default_factory=lambda: ["a"])


def test_a_default_made_by_a_factory_is_shown():
    fields = to_document(fdl.Config(_WithFactory), "x")["fields"]
    assert fields["names"] == ["a"]
