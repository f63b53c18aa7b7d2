"""Configs of strangers: nothing in them is run, nor connected to for them."""

import copy
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

import fiddle as fdl
import pytest
from fiddle.experimental import serialization

sys.path.insert(0, str(Path(__file__).parent))
import mutations
from strangers import names
from watched import watched

from mtl_jax.configuration import from_document
from mtl_jax.layers import mlp

pytestmark = pytest.mark.usefixtures("modules")


def renamed(module, name, old="Classification"):
    """A document that names something else in place of a head."""
    document = mutations.document("dense")
    for place in names(document["fiddle"]):
        if place["name"] == old:
            place.update(module=module, name=name)
    return document


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("mtl_jax.models.pretrained.files", "read_arrays"),
        ("mtl_jax.models.pretrained", "read_arrays"),
        ("mtl_jax.models.inference", "predict"),
        ("mtl_jax.optim.grouped", "_split"),
        ("mtl_jax.data.sources.tfds", "dataclasses"),
        ("fiddle._src.config", "get_callable"),
        ("fiddle._src.config", "Buildable"),
        ("fiddle._src.partial", "_build_partial"),
        ("flax.linen", "tabulate"),
        ("flax.linen.summary", "tabulate"),
        ("flax.linen.transforms", "lift_direct_transform"),
        ("flax.linen.kw_only_dataclasses", "dataclass"),
        ("jax.numpy.linalg", "inv"),
        ("jax.numpy", "frompyfunc"),
        ("jax.numpy", "ufunc"),
        ("optax.optax_test", "OptaxTest"),
        ("optax.losses._classification_test", "SoftmaxCrossEntropyTest"),
        ("builtins", "type"),
        ("builtins", "NoneType.__class__"),
        ("", ""),
        (".os", "system"),
        ("mtl_jax.optim\0", "sum"),
    ],
)
def test_what_has_no_place_in_a_config_is_not_named(module, name):
    with pytest.raises(ValueError, match=r"not in a trusted module|cannot be read"):
        from_document(renamed(module, name))
    assert not [
        name for name in sys.modules if name.startswith("optax.") and "_test" in name
    ]


def test_reading_a_document_calls_nothing(monkeypatch):
    calls = []

    def quick_gelu(*arguments):
        calls.append(arguments)

    quick_gelu.__module__ = mlp.__name__
    monkeypatch.setattr(mlp, "quick_gelu", quick_gelu)
    document = mutations.document("dense")
    function = {"type": "pyref", "module": mlp.__name__, "name": "quick_gelu"}
    metadata = {
        "type": "pyref",
        "module": "fiddle._src.config",
        "name": "BuildableTraverserMetadata",
    }
    called = {"type": metadata, "items": [["", 3]], "metadata": function}
    document["fiddle"]["objects"]["a_call"] = called
    document["fiddle"]["root"] = {"type": "ref", "key": "a_call"}
    with pytest.raises(ValueError, match=r"quick_gelu, which is not in a trusted"):
        from_document(document)
    assert calls == []
    # Fiddle itself takes the function for the type of a tuple with names.
    serialization.load_json(json.dumps(document["fiddle"]))
    assert calls == [(3,)]


def of_lists(objects, root):
    """A document that holds such lists; a string in one refers to another."""
    kind = {"type": "pyref", "module": "builtins", "name": "list"}

    def node(item):
        return {"type": "ref", "key": item} if isinstance(item, str) else item

    document = mutations.document("dense")
    document["fiddle"]["objects"] = {
        name: {"type": kind, "items": [["", node(i)] for i in items], "metadata": None}
        for name, items in objects.items()
    }
    document["fiddle"]["root"] = {"type": "ref", "key": root}
    return document


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ({"a": ["a"]}, "nested more than"),
        ({"a": ["b"], "b": ["c"], "c": ["a"]}, "nested more than"),
        ({"a": ["b"]}, "KeyError: 'b'"),
        (
            {
                "a": ["x0"],
                **{f"x{i}": [f"x{i + 1}"] * 9 for i in range(12)},
                "x12": [1],
            },
            "more than 100,000 values",
        ),
        (
            {"a": ["x0"], **{f"x{i}": [f"x{i + 1}"] for i in range(90)}, "x90": []},
            "nested",
        ),
        ({"a": [0] * 200_000}, "more than 100,000 values"),
    ],
)
def test_documents_without_end(objects, expected):
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"config.json cannot be read .*{expected}"):
        from_document(of_lists(objects, "a"))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "address",
    [
        *("gs://bucket/data", "s3://bucket", "hf://user/data", "GS://bucket", "az://x"),
        *("http://host/x", "file:///etc/passwd", "/gs/bucket", "/./s3/x", "/hf/x/../y"),
    ],
)
def test_addresses_are_not_connected_to(address):
    document = json.loads(
        json.dumps(mutations.document("dense")).replace('"train"', json.dumps(address))
    )
    with (
        watched() as events,
        pytest.raises(ValueError, match="names the address") as error,
    ):
        from_document(document)
    assert f"add --trust {address}" in str(error.value)
    assert events == []
    if "://" in address:
        assert from_document(document, [address[: address.index("://") + 4]])
        with pytest.raises(ValueError, match="names the address"):
            from_document(document, ["gs://other"])


def test_of_a_trusted_file_only_the_file_is_trusted(tmp_path):
    (tmp_path / "trusted.py").write_text("import beside\nfrom beside import Head\n")
    (tmp_path / "beside.py").write_text(
        "import flax.linen as nn\nclass Head(nn.Module):\n    num_classes: int\n"
    )
    # These would be found there first, by whatever imports them later.
    for name in ("antigravity", "this"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="add --trust beside"):
        from_document(renamed("beside", "Head"), [str(tmp_path / "trusted.py")])
    importlib.invalidate_caches()
    for name in ("antigravity", "this"):
        origin = importlib.util.find_spec(name).origin
        assert not Path(origin).is_relative_to(tmp_path)


def test_a_trusted_file_that_fails_says_where(tmp_path):
    file = tmp_path / "trusted.py"
    file.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ValueError, match=r"trusted\.py, line 2: ZeroDivisionError"):
        from_document(mutations.document("dense"), [str(file)])
    assert "trusted" not in sys.modules


def test_a_trusted_file_with_the_name_of_a_module_in_use(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="cannot be told from the module json"):
        from_document(mutations.document("dense"), [str(tmp_path / "json.py")])
    assert sys.modules["json"] is json


def test_a_document_that_is_none(mistake, tmp_path):
    for content, expected in (
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "config.json cannot be read (KeyError: 'fiddle')"),
    ):
        (tmp_path / "config.json").write_text(content)
        assert expected in mistake("show", "config.json")
    assert "no such file" in mistake("train", "other.json")
    (tmp_path / "config.json").write_text(json.dumps(mutations.document("dense")))
    assert "cannot be shrunk by --smoke" in mistake("train", "config.json", "--smoke")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    assert "more than any config" in mistake("show", "config.json")


def test_a_config_of_the_program_is_itself_harmless():
    # What the tests above change is read without them.
    assert isinstance(from_document(mutations.document("dense")), fdl.Config)
    assert isinstance(
        from_document(copy.deepcopy(mutations.document("experts"))), fdl.Config
    )
