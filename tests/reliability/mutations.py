"""Mutated commands: strategies that draw command lines, config files and documents."""

import json

from hypothesis import strategies as st
from mutated_logs import watching

from mtl_jax import configuration
from mtl_jax.configuration.fields import leaves

CONFIG = "tiny_config.py"
NAMES = ("dense", "pair", "experts", "maps")

WORDS = (
    *("", " ", "a", "all", "data", "model", "expert", "left", "digit", "elevation"),
    *("image", "train", "test", "params", "features", "inside", "appended", "nan"),
    *("float32", "bfloat16", "float16", "float64", "int8", "float33", "object"),
    *("a/b", "../../x", "/etc/passwd", "gs://bucket", "<script>alert(1)</script>"),
    *(
        "os.system",
        "jax.numpy.load",
        "optax.adam",
        "mtl_jax.optim.pcgrad",
        "é",
        "x" * 999,
    ),
    *("\x1b[31m", "\n", "{0}", "%s", "lambda: 1", "__class__", "1 2", "[[", "{[1]: 2}"),
)
NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 16, 63, 100, -1, -2, -8, 2**20, 2**31, 2**32, 2**63, 2**64),
    *(10**12, 10**40, -(10**12), 0.0, 0.5, 1.0, 1.5, -0.5, -1.0, 1e-30, 1e-300, 1e30),
    *(1e300, -1e300, float("inf"), -float("inf"), float("nan")),
)
OTHERS = (True, False, None, (), [], {}, b"x", 1j, ..., {1, 2}, {"a": 1})


def _text(value):
    """A literal that Python reads as the value."""
    if isinstance(value, float):
        return {"inf": "1e999", "-inf": "-1e999", "nan": "nan"}.get(
            str(value), repr(value)
        )
    if isinstance(value, tuple):
        return "(" + "".join(f"{_text(item)}, " for item in value) + ")"
    return "..." if value is ... else repr(value)


plain = st.sampled_from([*WORDS, *NUMBERS, *OTHERS])
nested = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)


def like(value):
    """Values that may well be right in place of one."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 28, -1, 10**12])
    if isinstance(value, float):
        return st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 100.0, -1.0, 1e300])
    if isinstance(value, str):
        return st.sampled_from(WORDS)
    if isinstance(value, tuple):
        return st.lists(
            st.sampled_from([1, 2, 7, "left", "right", "data", None]), max_size=3
        ).map(tuple)
    return nested


def paths(config):
    """Path -> value of every field, those inside others too."""
    found = {path: value for path, value, _ in leaves(config)}
    for path in list(found):
        while "." in path:
            path = path.rpartition(".")[0]
            found.setdefault(path, None)
    return found


PATHS = {}


def load(name):
    """A config, and what it has at each path."""
    if name not in PATHS:
        from tiny_config import VARIANTS

        PATHS[name] = paths(VARIANTS[name]())
    return PATHS[name]


def _is_plain(value):
    return isinstance(value, bool | int | float | str | tuple)


@st.composite
def assignments(draw, name):
    """``path=value`` for a path of a variant, now and then misspelt."""
    fields = load(name)
    # Fields that hold a number, a word or a tuple; now and then any.
    plain_fields = [path for path in sorted(fields) if _is_plain(fields[path])]
    path = draw(st.sampled_from(plain_fields * 9 + sorted(fields)))
    kind = draw(st.integers(0, 29))
    value = draw(nested if 3 <= kind < 6 else like(fields[path]))
    if kind == 0:
        at = draw(st.integers(0, len(path)))
        path = (
            path[:at]
            + draw(st.sampled_from(["x", ".", "", "=", "\0"]))
            + path[at + 1 :]
        )
    if kind == 1:
        return draw(
            st.sampled_from([path, "", "=", ".", "=1", f"{path}.x=1", "a.b.c=3"])
        )
    text = value if isinstance(value, str) else _text(value)
    if kind == 2:
        text = draw(
            st.sampled_from(
                [
                    "-" * 5000 + "1",
                    "(" * 300,
                    "9" * 5000,
                    "0x" + "f" * 5000,
                    "1if 2else 3",
                ]
            )
        )
    return f"{path}={text}"


flags = st.one_of(
    st.sampled_from(
        [
            *(
                ["--seed", "three"],
                ["--seed", "-1"],
                ["--seed", str(2**40)],
                ["--seed"],
            ),
            *(
                ["--seed", "1" * 50],
                ["--devices", "0"],
                ["--devices", "x"],
                ["--smoke"],
            ),
            *(["--devices", "-8"], ["--devices", str(10**12)], ["--smoke", "--smoke"]),
            *(
                ["--set"],
                ["--sett", "a=1"],
                ["--help-me"],
                ["more"],
                ["--trust", "x.py"],
            ),
            *(["--trust", ""], ["--trust", "gs://"], ["--workdir"], ["--seed", "1"]),
            *(["--workdir", "/proc/run"], ["--workdir", "/dev/null/run"]),
            *(["--workdir", "x" * 300], ["--workdir", "a\0b"], ["--workdir", "taken"]),
            *(
                ["--coordinator", "here"],
                ["--num-processes", "2"],
                ["--process-id", "0"],
            ),
        ]
    )
)

# Who follows a run, and what becomes of it. One that is right sends nothing anywhere.
followers = st.sampled_from(
    [
        *(["--debug-nans"], ["--tensorboard"], ["--profile", "1:2"]),
        *(
            ["--profile", text]
            for text in ("", "1", "0:1", "1:1", "2:1", "x:y", "1:2:3")
        ),
        *(["--profile", "2:3"], ["--profile", "1:" + "9" * 40], ["--profile=-1:2"]),
        *(["--profile"], ["--tensorboard", "x"], ["--debug-nans=1"]),
        *(["--wandb"], ["--wandb", ""], ["--wandb", "\n"]),
        *(["--fallback-dir", text] for text in ("taken", "a\0b", ".", "", "x" * 300)),
    ]
)

configs = st.sampled_from(
    [
        *(
            "",
            ".",
            "..",
            "/",
            "no_such",
            "no_such.py",
            "tiny_config",
            "a\0b.py",
            ":",
            ".py",
        ),
        *(
            f"{CONFIG}:",
            f"{CONFIG}:no_such",
            f"{CONFIG}:dense:dense",
            "x" * 300,
            "x" * 300 + ".py",
        ),
        *("earth_digits:", "earth_digits:moon", "../configs/no_such", "\udcff"),
        *(
            "no.json",
            "folder.py",
            "folder.json",
            "taken",
            "/dev/null",
            "/proc/self/mem.json",
        ),
    ]
)

EXPRESSIONS = (
    *(
        "optax.sgd",
        "optax.adam(1e-3)",
        "jnp.sin",
        "jnp.float32",
        "jnp.zeros(3)",
        "print",
    ),
    *("fdl.Config(optax.adam)", "fdl.Partial(optax.adam)", "fdl.Partial(optim.mgda)"),
    *("fdl.Config(optim.sum)", "fdl.Partial(optim.cagrad, c=-1.0)", "fdl.Config(dict)"),
    *(
        "fdl.Partial(optim.pcgrad)",
        "fdl.Partial(optim.uncertainty)",
        "fdl.Partial(optim.gsam)",
    ),
    *("fdl.Partial(MoE)", "fdl.Config(MoE, 2)", "MoE", "VisionTransformer()", "config"),
    *(
        "fdl.Config(VisionTransformer)",
        "fdl.Config(Mixture, {}, 8)",
        "fdl.Config(Rules)",
    ),
    *(
        "fdl.Config(MeshShape)",
        "fdl.Config(Classification)",
        "fdl.Partial(Classification, 3)",
    ),
    *(
        "lambda *a, **k: None",
        "lambda x: x",
        "1 / 0",
        "[config]",
        "object()",
        "nn.Dense(3)",
    ),
    *(
        "fdl.Partial(nn.Dense, 3)",
        "fdl.Config(nn.Dense)",
        "Digits('train')",
        "nn.Module",
    ),
    *("fdl.Config(Digits, 'train')", "fdl.Config(Digits)", "fdl.Config(Earth, 'test')"),
    *(
        "dihedral",
        "random_shift",
        "huber",
        "softmax_cross_entropy",
        "fdl.Config(accuracy)",
    ),
    *(
        "np.int64(3)",
        "np.float32(2)",
        "np.array(3)",
        "np.zeros(2)",
        "'a'",
        "10**30",
        "None",
    ),
    *("fdl.Config(Experiment)", "fdl.Partial(Experiment)", "type", "sys.exit", "sys"),
    *("float('nan')", "-1", "(None,)", "{}", "frozenset([1])", "iter(())", "Path('x')"),
)

HEADER = """
import sys
from pathlib import Path
import fiddle as fdl, flax.linen as nn, jax.numpy as jnp, numpy as np, optax
from mtl_jax import optim
from mtl_jax.data import Mixture, dihedral, random_shift
from mtl_jax.data.sources.digits import Digits
from mtl_jax.data.sources.earth import Earth
from mtl_jax.layers.heads import Classification
from mtl_jax.layers.moe import MoE
from mtl_jax.models import VisionTransformer
from mtl_jax.sharding import Rules
from mtl_jax.tasks import accuracy, huber, softmax_cross_entropy
from mtl_jax.train import Experiment, MeshShape
from tiny_config import VARIANTS as ALL
"""

BROKEN_FILES = (
    *("", "def f(:", "VARIANTS = 3", "VARIANTS = {}", "import no_such", "1 / 0"),
    *("VARIANTS = {'a': 3}", "VARIANTS = {'a': dict}", "VARIANTS = {1: lambda: 2}"),
    *("raise SystemExit(0)", "raise SystemExit", "import sys; sys.exit('no')", "\0"),
    *(
        "def f(): return f()\nVARIANTS = {'a': f}",
        "x = [\n",
        "\tx = 1\n  y = 2",
        "é = 'x'",
    ),
    *("raise BaseExceptionGroup('a', [ValueError('b'), ValueError('c')])",),
    *(
        "raise ValueError('one\\ntwo\\n\\x1b[31mthree')",
        "raise AssertionError",
    ),
    *("class E(Exception):\n    __str__ = lambda self: 1 / 0\nraise E", "return 3"),
    *("from tiny_config import *\nsmoke = 3", "from tiny_config import VARIANTS"),
    *("from tiny_config import *\ndef smoke(config): config.no_such = 3",),
    *("from tiny_config import *\ndef smoke(config): del config.tasks",),
)


@st.composite
def files(draw):
    """A config file, and whether it is called with --smoke."""
    if draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from(BROKEN_FILES)), draw(st.booleans())
    name = draw(st.sampled_from(NAMES))
    body = [f"    config = ALL[{name!r}]()"]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        path = draw(st.sampled_from(sorted(load(name))))
        body.append(f"    {_access(path)} = {draw(st.sampled_from(EXPRESSIONS))}")
    lines = ["def main():", *body, "    return config", "VARIANTS = {'main': main}"]
    return HEADER + "\n".join(lines) + "\n", False


def _access(path):
    """The field as Python writes it."""
    parts, code = path.split("."), "config"
    for before, part in zip([None, *parts], parts, strict=False):
        if before == "components":
            code += f"[{part!r}]"
        elif before == "tasks" or part.isdigit():
            code += f"[{int(part) if part.isdigit() else 0}]"
        else:
            code += f".{part}"
    return code


def document(name):
    """What a run's config.json holds."""
    from tiny_config import VARIANTS

    saved = configuration.to_document(VARIANTS[name](), name)
    return json.loads(json.dumps(saved))


def places(node, at=()):
    """Every place in a document."""
    yield at
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*at, key))


json_values = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            0,
            -1,
            3,
            10**30,
            1.5,
            "",
            "a",
            "os",
            [],
            {},
            [[]],
            {"type": "ref"},
        ]
    ),
    st.builds(
        lambda module, name: {"type": "pyref", "module": module, "name": name},
        st.sampled_from(
            [
                "os",
                "builtins",
                "optax",
                "mtl_jax.optim",
                "flax.linen",
                "jax.numpy",
                "mtl_jax.models.vit",
                "",
            ]
        ),
        st.sampled_from(
            [
                "system",
                "eval",
                "adam",
                "sum",
                "Dense",
                "load",
                "VisionTransformer",
                "",
                "a.b",
            ]
        ),
    ),
)


@st.composite
def documents(draw):
    """A damaged document as text."""
    saved = document(draw(st.sampled_from(NAMES)))
    kind = draw(st.integers(0, 5))
    text = json.dumps(saved)
    if kind == 0:
        return text[: draw(st.integers(0, len(text)))]
    if kind == 1:
        at = draw(st.integers(0, len(text)))
        return (
            text[:at]
            + draw(st.sampled_from(["\0", "{", "}", "[" * 5000, ",", "é"]))
            + text[at:]
        )
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(sorted(places(saved["fiddle"]), key=str)))
        if not where:
            continue
        node = saved["fiddle"]
        try:
            for key in where[:-1]:
                node = node[key]
            if draw(st.booleans()):
                node[where[-1]] = draw(json_values)
            else:
                other = draw(st.sampled_from(sorted(saved["fiddle"]["objects"])))
                node[where[-1]] = {"type": "ref", "key": other}
        except (KeyError, IndexError, TypeError):
            continue
    return json.dumps(saved)


@st.composite
def commands(draw):
    """A command line and the files that it reads.

    Returns:
      The arguments, and file name -> content.
    """
    if draw(st.integers(0, 9)) == 0:
        return draw(watching())
    command = draw(st.sampled_from(["train", "train", "train", "show"]))
    kind = draw(st.integers(0, 9))
    extra, content = [], {}
    if kind < 6:
        name = draw(st.sampled_from(NAMES))
        config = f"{CONFIG}:{name}"
        for assignment in draw(st.lists(assignments(name), min_size=1, max_size=2)):
            extra += ["--set", assignment]
        if draw(st.integers(0, 7)) == 0:
            extra += draw(flags)
        if draw(st.integers(0, 7)) == 0:
            extra += draw(followers)
    elif kind == 6:
        config = draw(st.one_of(st.just(f"{CONFIG}:dense"), configs))
        for more in draw(st.lists(flags | followers, min_size=1, max_size=2)):
            extra += more
    elif kind == 7:
        config = "saved/config.json"
        content[config] = draw(documents())
    else:
        config = "own.py"
        content[config], smoke = draw(files())
        extra += ["--smoke"] if smoke else []
    arguments = [command, config, *extra]
    if draw(st.integers(0, 29)) == 0:
        del arguments[draw(st.integers(0, len(arguments) - 1))]
    return arguments, content
