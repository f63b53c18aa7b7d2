"""Damaged data files: each is reported in a line that names it, in bounded memory."""

import importlib.util
import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
import damage
import mutations

HERE = Path(__file__).parent
TESTS = HERE.parent
FIXTURES = TESTS / "models" / "pretrained" / "fixtures"
# What a process may grow by while it reads a file of a few kilobytes or refuses it.
MEMORY = 300 * 2**20

SHAPES = {"image": (20, 4, 4), "label": (20,)}
WIDTH = 8


def big_vision():
    """The arrays of a vision transformer with one block."""
    block = "Transformer/encoderblock_0"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    shapes = {
        "embedding/kernel": (2, 2, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "pos_embedding": (1, 9, WIDTH),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
        **{
            f"{block}/LayerNorm_{i}/{part}": (WIDTH,)
            for i in (0, 1)
            for part in ("scale", "bias")
        },
        **{
            f"{attention}/{part}/{name}": shape
            for part in ("query", "key", "value")
            for name, shape in (("kernel", (WIDTH, 2, 4)), ("bias", (2, 4)))
        },
        f"{attention}/out/kernel": (2, 4, WIDTH),
        f"{attention}/out/bias": (WIDTH,),
        f"{block}/MlpBlock_0/Dense_0/kernel": (WIDTH, 16),
        f"{block}/MlpBlock_0/Dense_0/bias": (16,),
        f"{block}/MlpBlock_0/Dense_1/kernel": (16, WIDTH),
        f"{block}/MlpBlock_0/Dense_1/bias": (WIDTH,),
    }
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def damaged_npz(arrays, rng):
    """An archive with an array replaced, left out or renamed, or damaged as a whole."""
    if rng.random() < 0.4:
        good = damage.archive({f"{k}.npy": damage.npy(a) for k, a in arrays.items()})
        return damage.damaged_bytes(good, rng)
    arrays = dict(arrays)
    name = rng.choice(list(arrays))
    kind = rng.randrange(6)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[rng.choice(["../x", "x", f"{name}/x"])] = arrays.pop(name)
    else:
        arrays[name] = damage.damaged_array(arrays[name], rng)
    return damage.archive({f"{k}.npy": damage.npy(a) for k, a in arrays.items()})


class Cases:
    """Damaged files in a folder, and what is to read each."""

    def __init__(self, folder):
        self.folder, self.cases, self.count = folder, [], itertools.count()

    def add(self, reader, name, *arguments, named, must_refuse=False):
        """Adds one.

        Args:
          reader: Which function of read_damaged.py is to read it.
          name: What is wrong with it.
          *arguments: What is given to the reader.
          named: What a message must name.
          must_refuse: Whether it cannot be read by any means.
        """
        self.cases.append(
            {
                "reader": reader,
                "name": name,
                "arguments": arguments,
                "named": named,
                "must_refuse": must_refuse,
            }
        )

    def new(self):
        """A new folder."""
        folder = self.folder / str(next(self.count))
        folder.mkdir()
        return folder


def of_arrays(cases, number):
    good = {"image": np.zeros(SHAPES["image"], np.uint8), "label": np.arange(20)}
    for name, content in damage.npz_bombs(SHAPES).items():
        path = cases.new() / "data.npz"
        path.write_bytes(content)
        # A path is a name like others, and nothing is looked for by it.
        other = "path" in name
        shapes = dict.fromkeys(SHAPES, (3,)) if other else SHAPES
        cases.add(
            *("arrays", name, str(path.parent), "data.npz", shapes),
            named="data.npz",
            must_refuse=not other,
        )
    for seed in range(number):
        path = cases.new() / "data.npz"
        path.write_bytes(damaged_npz(good, random.Random(f"arrays {seed}")))
        cases.add(
            *("arrays", f"seed {seed}", str(path.parent), "data.npz", SHAPES),
            named="data.npz",
        )


def of_big_vision(cases, number):
    for name, content in damage.npz_bombs(big_vision()).items():
        path = cases.new() / "model.npz"
        path.write_bytes(content)
        cases.add("big_vision", name, str(path), named="model.npz", must_refuse=True)
    for seed in range(number):
        path = cases.new() / "model.npz"
        path.write_bytes(damaged_npz(big_vision(), random.Random(f"models {seed}")))
        cases.add("big_vision", f"seed {seed}", str(path), named="model.npz")


def of_safetensors(cases, number):
    for name, content in damage.safetensors_bombs().items():
        path = cases.new() / "model.safetensors"
        path.write_bytes(content)
        cases.add("published", name, str(path), named=path.name, must_refuse=True)
    good = cases.folder / "good.safetensors"
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.arange(5)}, good)
    for seed in range(number):
        path = cases.new() / "model.safetensors"
        rng = random.Random(f"safetensors {seed}")
        path.write_bytes(damage.damaged_bytes(good.read_bytes(), rng))
        cases.add("published", f"seed {seed}", str(path), named=path.name)


def of_published(cases, number):
    """Folders of models whose JSON is damaged."""
    files = [
        ("huggingface", folder, file)
        for folder in ("vit", "clip", "dinov2", "deit")
        for file in ("config.json", "preprocessor_config.json")
    ]
    files.append(("timm", "timm_vit", "config.json"))
    for seed in range(number):
        rng = random.Random(f"published {seed}")
        reader, family, file = files[seed % len(files)]
        folder = cases.new() / "model"
        shutil.copytree(FIXTURES / family, folder)
        path = folder / file
        document = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(damage.damaged_json(document, rng))
        cases.add(reader, f"{file} {seed}", str(folder), family, named=str(folder))
    for name, content in {
        "names": {"weight_map": {"a": 3}},
        "a list of names": {"weight_map": {"a": ["b"]}},
        "nothing": {"weight_map": {}},
        "a path": {"weight_map": {"a": "../../model.safetensors"}},
        "the folder above": {"weight_map": {"a": ".."}},
        "an end of text": {"weight_map": {"a": "\0"}},
        "another kind": {"weight_map": {"a": "model.bin"}},
        "too much": {"weight_map": {"a": "x" * 5000}},
    }.items():
        folder = cases.new()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        cases.add(
            *("published", f"an index of {name}", str(folder)),
            named=str(folder),
            must_refuse=name != "nothing",
        )


def of_tfds(cases, number):
    from mtl_jax.data import builders

    folder = Path(builders.prepare("digits", str(cases.folder / "tfds")))
    files = sorted(path.name for path in folder.iterdir())
    for seed in range(number):
        rng = random.Random(f"tfds {seed}")
        data_dir = cases.new()
        copy = data_dir / "digits" / folder.name
        shutil.copytree(folder, copy)
        path = copy / files[seed % len(files)]
        if path.suffix == ".json" and rng.random() < 0.7:
            document = json.loads(path.read_text())
            path.write_text(damage.damaged_json(document, rng))
        else:
            path.write_bytes(damage.damaged_bytes(path.read_bytes(), rng))
        cases.add(
            "tfds", f"{path.name} {seed}", str(data_dir), "digits", named="digits"
        )


def made_up_runs(folder):
    """Two folders of runs, as the tests of pages make them."""
    specification = importlib.util.spec_from_file_location(
        "report_conftest", TESTS / "report" / "conftest.py"
    )
    conftest = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(conftest)
    make = conftest.make_run.__wrapped__(folder)
    return (
        make("good", tasks=("surface", "elevation", "digit"), num_steps=6),
        make("other", tasks=("surface", "digit"), num_steps=4, seed=1),
    )


def of_pages(cases, number):
    """Folders of finished runs, of which pages are made."""
    good, other = made_up_runs(cases.new())
    names = itertools.cycle(
        ("result.json", "metrics.jsonl", "samples.npz", "timings.jsonl", "config.json")
    )
    for seed, name in zip(range(number), names, strict=False):
        folder = cases.new() / "run"
        shutil.copytree(good, folder)
        damage_file(folder / name, random.Random(f"pages {seed}"))
        cases.add("pages", f"{name} {seed}", str(folder), str(other), named=str(folder))


def of_runs(cases, number):
    """Folders of runs for what continues or evaluates them."""
    good, _ = made_up_runs(cases.new())
    for seed in range(number):
        folder = cases.new() / "run"
        shutil.copytree(good, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(mutations.document("dense")))
        rng = random.Random(f"runs {seed}")
        damage_file(folder / ("metrics.jsonl" if seed % 4 == 0 else "config.json"), rng)
        # What is wrong with a config has names of its fields.
        cases.add("run", f"seed {seed}", str(folder), named="")


def damage_file(path, rng):
    if rng.random() < 0.25:
        path.write_bytes(damage.damaged_bytes(path.read_bytes(), rng))
    elif path.suffix == ".npz":
        with np.load(path) as archive:
            path.write_bytes(damaged_npz(dict(archive), rng))
    elif path.suffix == ".json":
        path.write_text(damage.damaged_json(json.loads(path.read_text()), rng))
    else:
        lines = path.read_text().splitlines()
        chosen = rng.choice([range(len(lines)), [rng.randrange(len(lines))]])
        seed = rng.random()
        for line in chosen:
            # The same in all chosen lines, or in one.
            document = json.loads(lines[line])
            lines[line] = damage.damaged_json(document, random.Random(seed))
        path.write_text("\n".join(lines) + "\n")


def read(cases, tmp_path):
    """Has all cases read in one process; returns what came of each."""
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = [sys.executable, "-W", "error", str(HERE / "read_damaged.py")]
    finished = subprocess.run(
        [*script, str(tmp_path / "cases.json")],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    results = [json.loads(line) for line in finished.stdout.splitlines()]
    ended = f"ended by {cases[len(results)] if len(results) < len(cases) else 'all'}"
    assert finished.returncode == 0, f"{ended}\n{finished.stderr[-2000:]}"
    return results


def faults(results):
    """A line for each case that did not end as it must."""
    for case in results:
        fault = None
        if case["outcome"] == "traceback":
            fault = case["message"][-700:]
        elif case["outcome"] == "read" and case["must_refuse"]:
            fault = "was read"
        elif case["grown"] > MEMORY:
            fault = f"took {case['grown']:,} bytes"
        elif case["outcome"] == "refused":
            if case["named"] not in case["message"]:
                fault = f"is not named in {case['message'][:300]!r}"
            elif "\n" in case["message"]:
                fault = f"has lines: {case['message'][:300]!r}"
        if fault:
            yield f"{case['reader']} {case['name']} {case['arguments'][0]}: {fault}"


def check(tmp_path, sizes):
    cases = Cases(tmp_path / "cases")
    cases.folder.mkdir()
    for make, number in sizes.items():
        make(cases, number)
    results = read(cases.cases, tmp_path)
    found = list(faults(results))
    assert not found, f"{len(found)} of {len(results)}:\n" + "\n".join(found)
    # Nothing leaves the folder that it was put in.
    assert not list(tmp_path.rglob("escaped*"))
    assert not Path("/tmp/escaped.npy").exists()
    return results


def test_damaged_files(tmp_path):
    results = check(
        tmp_path,
        {
            of_arrays: 10,
            of_big_vision: 6,
            of_safetensors: 10,
            of_published: 8,
            of_pages: 1,
            of_runs: 4,
        },
    )
    assert len(results) > 90


@pytest.mark.slow
def test_200_damaged_files(tmp_path):
    results = check(
        tmp_path,
        {
            of_arrays: 40,
            of_big_vision: 40,
            of_safetensors: 40,
            of_published: 40,
            of_tfds: 40,
            of_pages: 40,
            of_runs: 40,
        },
    )
    assert len(results) >= 300
    assert sum(case["outcome"] == "refused" for case in results) >= 200
