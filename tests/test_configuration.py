import importlib.util
import re
import sys
import textwrap

import pytest

from mtl_jax import configuration
from mtl_jax.configuration import (
    from_document,
    load_config,
    override,
    to_document,
)


def config():
    return load_config("earth_digits", smoke=True)


def changed(*assignments):
    result = config()
    override(result, assignments)
    return result


def test_the_shipped_configs_are_known():
    assert "earth_digits" in configuration.known_configs()


@pytest.mark.parametrize("name", ["earth_digit", "", "no/such", "no_such.py"])
def test_an_unknown_config_lists_the_known(name):
    with pytest.raises(ValueError, match=r"unknown config .* earth_digits"):
        load_config(name)


def test_an_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match=r"no variant 'moon'.* main"):
        load_config("earth_digits:moon")


def test_the_first_variant_is_the_default():
    assert load_config("earth_digits") == load_config("earth_digits:main")


def test_a_config_may_be_any_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import fiddle as fdl\n"
        "from mtl_jax.train import MeshShape\n"
        "VARIANTS = {'small': lambda: fdl.Config(MeshShape, data=2),\n"
        "            'large': lambda: fdl.Config(MeshShape, data=4)}\n"
        "def smoke(config):\n"
        "    config.data = 1\n"
    )
    assert load_config(str(path)).data == 2
    assert load_config(f"{path}:large").data == 4
    assert load_config(f"{path}:large", smoke=True).data == 1
    assert configuration.full_name(f"{path}:large") == "own:large"
    assert configuration.full_name(str(path)) == "own"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a config file of one's own; returns its path."""
    # Loading adds its folder.
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(content, name="own.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(content))
        importlib.invalidate_caches()
        return str(path)

    return write


@pytest.mark.parametrize(
    "content", ["", "VARIANTS = {}\n", "VARIANTS = ['main']\n", "VARIANTS = 3\n"]
)
def test_a_file_without_variants_is_no_config(own, content):
    with pytest.raises(ValueError, match="needs a dict VARIANTS"):
        load_config(own(content))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "import json\n\nimport no_such",
            r"own\.py, line 3: ModuleNotFoundError: .*'no",
        ),
        ("x = 1\ndef main(:\n", r"own\.py, line 2: SyntaxError"),
        ("x = 1\nprint(y)\n", r"own\.py, line 2: NameError: name 'y'"),
        ("def main():\n    return 1 / 0\nVARIANTS = {'main': main}", "line 2: ZeroDiv"),
        ("VARIANTS = {'main': 3}", "'int' object is not callable"),
        ("VARIANTS = {'main': dict}", "returns a dict; it must return an fdl.Config"),
    ],
)
def test_a_config_file_that_fails_says_where(own, content, expected):
    with pytest.raises(ValueError, match=expected):
        load_config(own(content))


def test_a_smoke_that_fails_says_where(own):
    path = own(
        """
        import fiddle as fdl
        VARIANTS = {"main": lambda: fdl.Config(dict)}
        def smoke(config):
            config.trunk.depth = 1
        """
    )
    load_config(path)
    with pytest.raises(ValueError, match=r"own\.py, line 5: AttributeError"):
        load_config(path, smoke=True)


OWN = """
    import functools

    import fiddle as fdl
    import numpy as np
    from beside_the_config import Head, inner, loss
    from mtl_jax.configuration import load_config

    def own_loss(prediction, target):
        return prediction, target

    def changed(loss):
        config = load_config("earth_digits:single_digit")
        config.tasks[0].loss = loss
        return config

    VARIANTS = {
        "beside": lambda: changed(loss),
        "own": lambda: changed(own_loss),
        "nameless": lambda: changed(lambda prediction, target: (prediction, target)),
        "inner": lambda: changed(inner()),
        "partial": lambda: changed(functools.partial(loss, delta=1)),
        "array": lambda: changed(np.zeros(3)),
    }
    """

BESIDE = """
    def loss(prediction, target):
        return prediction, target

    def inner():
        def function(prediction, target):
            return prediction, target
        return function

    class Head:
        pass
    """


@pytest.fixture
def beside(own, monkeypatch):
    """A config that imports a module beside it."""
    own(BESIDE, "beside_the_config.py")
    monkeypatch.delitem(sys.modules, "beside_the_config", raising=False)
    yield own(OWN)
    sys.modules.pop("beside_the_config", None)


def test_a_module_beside_the_config_is_found_and_named(beside):
    saved = to_document(load_config(f"{beside}:beside"), "x")
    assert saved["fields"]["tasks.digit.loss"] == "beside_the_config.loss"
    with pytest.raises(ValueError, match="add --trust beside_the_config"):
        from_document(saved)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("own", "own_loss"),
        ("nameless", "<lambda>"),
        ("inner", "function"),
        ("partial", "functools.partial"),
        ("array", "array"),
    ],
)
def test_what_cannot_be_named_in_a_document_is_explained(beside, variant, name):
    config = load_config(f"{beside}:{variant}")
    with pytest.raises(
        ValueError, match=r"tasks\.digit\.loss is .*cannot name"
    ) as error:
        to_document(config, "x")
    assert name in str(error.value)
    assert "module beside the config" in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("seed=3", lambda c: c.seed, 3),
        ("optimizer.learning_rate=1", lambda c: c.optimizer.learning_rate, 1.0),
        ("optimizer.learning_rate=1e-4", lambda c: c.optimizer.learning_rate, 1e-4),
        ("optimizer.max_norm=None", lambda c: c.optimizer.max_norm, None),
        ("evaluation_examples=None", lambda c: c.evaluation_examples, None),
        ("gradients_at=features", lambda c: c.gradients_at, "features"),
        ("gradients_at='features'", lambda c: c.gradients_at, "features"),
        ("trunk.remat=True", lambda c: c.trunk.remat, True),
        ("trunk.dtype=bfloat16", lambda c: c.trunk.dtype, "bfloat16"),
        ("trunk.moe=None", lambda c: c.trunk.moe, None),
        ("trunk.moe.num_experts=4", lambda c: c.trunk.moe.num_experts, 4),
        ("tasks.surface.head.hidden=64", lambda c: c.tasks[0].head.hidden, 64),
        ("tasks.climate.name=zone", lambda c: c.tasks[1].name, "zone"),
        ("tasks.digit.target=left", lambda c: c.tasks[4].target, "left"),
        (
            "mixture.components.earth.weight=2",
            lambda c: c.mixture.components["earth"].weight,
            2.0,
        ),
        (
            "mixture.components.earth.tasks=('surface', 'climate')",
            lambda c: c.mixture.components["earth"].tasks,
            ("surface", "climate"),
        ),
        (
            "mixture.components.digits.train.split=test",
            lambda c: c.mixture.components["digits"].train.split,
            "test",
        ),
        ("rules.embed=None", lambda c: c.rules.embed, None),
        ("rules.embed=('data','model')", lambda c: c.rules.embed, ("data", "model")),
    ],
)
def test_fields_are_set_by_their_path(assignment, read, value):
    result = read(changed(assignment))
    assert result == value
    assert type(result) is type(value)


def test_what_has_no_name_of_its_own_is_set_by_its_number():
    config = load_config("mod_squad")
    override(config, ["trunk.attention.0.num_experts=9"])
    assert config.trunk.attention[0].num_experts == 9


def test_later_assignments_win():
    assert changed("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("assignment", "nearest"),
    [
        ("num_step=3", "'num_steps'"),
        ("trunk.widht=3", "'width'"),
        ("trunk.moe.num_expert=3", "'num_experts'"),
        ("optimizer.learningrate=3", "'learning_rate'"),
        ("tasks.surfaces.head.hidden=3", "'surface'"),
        ("mixture.components.digit.weight=1", "'digits'"),
        ("mixture.components.earth.wieght=1", "'weight'"),
        ("mixtures.batch_size=3", "'mixture'"),
    ],
)
def test_an_unknown_field_names_the_nearest(assignment, nearest):
    with pytest.raises(ValueError, match=f"no field .*; did you mean {nearest}"):
        changed(assignment)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=1.5", "seed is 1.5 of type float; it must be int"),
        ("seed=True", "seed is True of type bool; it must be int"),
        ("seed=three", "seed is 'three' of type str; it must be int"),
        ("seed=None", "seed is None"),
        ("num_steps=1e3", "num_steps is 1000.0 of type float; it must be int"),
        ("trunk.remat=1", "trunk.remat is 1 of type int; it must be bool"),
        ("trunk.width=(1,)", "trunk.width is .* it must be int"),
        ("optimizer.learning_rate=True", "of type bool; it must be float"),
        ("optimizer.learning_rate=fast", "of type str; it must be float"),
        ("optimizer.max_norm=x", "it must be float | None"),
        ("gradients_at=param", "it must be Literal"),
        ("tasks.surface.target=3", "it must be str"),
        ("trunk.moe=3", "trunk.moe is 3"),
        ("trunk=3", "trunk is 3"),
        ("mixture.components.earth=3", "mixture.components.earth is 3"),
        ("mixture.components.earth.tasks=surface", "it must be tuple"),
        ("mixture.components.earth.tasks=(1, 'climate')", "it must be tuple"),
        ("tasks=(1, 2)", "it must be tuple"),
        ("tasks.surface=3", "tasks.surface names an item of a sequence"),
        ("seed.x=3", "'seed' has no field 'x': it has no fields"),
        ("seed", "not of the form path=value"),
        ("=3", "no field ''"),
    ],
)
def test_a_value_of_another_type_is_refused(assignment, expected):
    with pytest.raises(ValueError, match=expected.replace("|", r"\|")):
        changed(assignment)


def test_a_config_that_cannot_be_built_is_a_user_s_mistake():
    broken = config()
    del broken.num_steps
    with pytest.raises(ValueError, match="num_steps"):
        configuration.build(broken)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: setattr(c, "num_steps", "850"), "num_steps is '850' of type str"),
        (lambda c: setattr(c, "num_steps", None), "num_steps is None"),
        (lambda c: setattr(c, "seed", 1.5), "seed is 1.5"),
        (lambda c: setattr(c.trunk, "width", "wide"), "trunk.width is 'wide'"),
        (
            lambda c: setattr(c.tasks[0].head, "hidden", None),
            "tasks.surface.head.hidden",
        ),
        (
            lambda c: setattr(c.mixture.components["earth"], "tasks", "surface"),
            "mixture.components.earth.tasks is 'surface' of type str",
        ),
        (
            lambda c: setattr(c.optimizer, "learning_rate", float("nan")),
            "optimizer.learning_rate is nan; it must be finite",
        ),
        (
            lambda c: setattr(c.mixture, "temperature", float("inf")),
            "mixture.temperature is inf; it must be finite",
        ),
        (
            lambda c: setattr(c.mixture.components["earth"].train, "split", "dev"),
            "mixture.components.earth.train: split 'dev' is unknown",
        ),
    ],
)
def test_a_value_that_cannot_be_built_names_its_field(change, expected):
    broken = config()
    change(broken)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}") as error:
        configuration.build(broken)
    assert "Fiddle" not in str(error.value)


def test_whole_numbers_may_stand_for_others():
    whole = config()
    whole.mixture.components["digits"].weight = 5
    assert configuration.build(whole).mixture.components["digits"].weight == 5
