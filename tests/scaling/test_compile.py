"""The command from end to end, and what the compiler's complaints become."""

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mtl_jax import cli
from mtl_jax.cli import options
from mtl_jax.scaling.chips import CHIPS
from mtl_jax.scaling.compile import OutOfMemoryError, _out_of_memory
from mtl_jax.scaling.topology import Topology

ROOT = Path(__file__).parent.parent.parent
SMALL = ("compile", "earth_digits:single_digit", "--smoke")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="libtpu is made for Linux on x86-64 alone",
)


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    """Optax's schedules mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_step_is_compiled_and_described(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(
        [*SMALL, "--topology", "v5e:2x4", "--quick", "--set", "mixture.batch_size=64"]
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "v5e:2x4: 8 chips, mesh data=2 fsdp=1 expert=4 model=1" in captured.out
    path = tmp_path / "runs/compile/earth_digits-single_digit-v5e-2x4.json"
    assert f"saved: {path.relative_to(tmp_path)}" in captured.out
    found = json.loads(path.read_text())
    assert found["config"] == "earth_digits:single_digit"
    assert (found["chips"], found["batch_size"]) == (8, 64)

    # Adam keeps two moments of each parameter.
    held = found["bytes"]
    assert held["optimizer_state"] == pytest.approx(2 * held["parameters"], rel=0.01)
    # 8 images of 28 x 28 bytes a chip, and their labels.
    assert held["batch"] == pytest.approx(8 * 28 * 28, rel=0.05)
    parts = sum(held[name] for name in held if name not in ("peak", "capacity"))
    assert parts == held["peak"] < held["capacity"] == 16 * 2**30

    # What a chip executes is its share.
    assert found["chip_flops"] == pytest.approx(found["flops"] / 8, rel=0.1)
    # Two blocks, one of experts: there and back, forward and backward. 49 tokens of an
    # image go to 2 of 8 experts with a quarter more room: 16 slots for each expert and
    # each of 8 images, of 24 floats.
    (tokens,) = [t for t in found["collectives"] if t["kind"] == "all-to-all"]
    assert (tokens["axes"], tokens["overlapped"]) == (["expert"], False)
    assert tokens["count"] == 4
    assert tokens["bytes"] == 4 * (8 * 8 * 16 * 24 * 4)
    assert found["seconds"] == pytest.approx(
        max(found["roofline"]["compute"], found["roofline"]["memory"])
        + sum(found["roofline"]["exposed"].values())
    )
    assert found["examples_per_second"] == pytest.approx(64 / found["seconds"])


@pytest.mark.slow
def test_a_chip_of_two_devices(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    topology = ("--topology", "tpu7x:2x2x1", "--set", "mixture.batch_size=64")
    cli.main([*SMALL, *topology, "--quick", "--output", "found.json"])
    printed = capsys.readouterr().out
    assert "tpu7x:2x2x1: 4 chips, mesh data=2 fsdp=1 expert=4 model=1" in printed
    assert "batch of 64 examples, 16 a chip" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["chips"], found["batch_size"]) == (4, 64)
    (tokens,) = [t for t in found["collectives"] if t["kind"] == "all-to-all"]
    assert tokens["count"] == 4


@pytest.mark.slow
def test_a_chip_of_two_devices_that_add_up_in_pairs(tmp_path):
    """In a process of its own, as libtpu reads its arguments once, and might abort."""
    command = ["compile", "vision_moe:tiny_6m", "--topology", "tpu7x:2x2x1", "--quick"]
    command += ["--set", "mesh.expert=2", "--output", "found.json"]
    command = [sys.executable, ROOT / "run.py", *command]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["mesh"]["expert"] == 2


@pytest.mark.slow
def test_a_search_compiles_until_it_has_the_largest_batch(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    # Of so small a model any batch fits; it ends at 16 examples on each of 8 chips.
    search = importlib.import_module("mtl_jax.scaling.search")
    monkeypatch.setattr(search, "MOST_EXAMPLES", 16)
    topology = ("--topology", "v5e:2x4", "--set", "mixture.batch_size=64")
    cli.main([*SMALL, *topology, "--quick", "--search", "--output", "found.json"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["batch_size"], found["remat"]) == (128, False)
    assert found["bytes"]["batch"] == pytest.approx(16 * 28 * 28, rel=0.05)
    assert "batch of 128 examples, 16 a chip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v9:2x2"), "topology 'v9:2x2' is unknown"),
        (("--topology", "v5e:2x4", "--set", "mesh.expert=3"), "do not divide 8"),
        (("--topology", "v5e:2x4", "--set", "mesh.exprt=4"), "did you mean 'expert'"),
        (("--topology", "v5e:2x4", "--devices", "8"), "from --topology"),
        (("--topology", "v5e:2x4", "--set", "mixture.batch_size=60"), "multiple of 8"),
        ((), "--topology"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main([*SMALL, *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("mtl-jax: error: ")
    assert message in error
    assert not [*tmp_path.iterdir()]


# As libtpu 0.0.41 complains.
@pytest.mark.parametrize(
    ("complaint", "message"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory "
            "space hbm. Used 35.68G of 15.75G hbm. Exceeded hbm capacity by 19.93G.",
            "15.75G of memory and would need 35.68G",
        ),
        (
            "RESOURCE_EXHAUSTED: Allocation (size=104857600000) would exceed memory "
            "(size=17179869184) :: %s0 = inlined_call_operand.hbm",
            "16.00G of memory and one array alone needs 97.66G",
        ),
    ],
)
def test_too_little_memory_is_told_in_figures(complaint, message):
    topology = Topology("v5e:2x4", CHIPS["v5e"], (2, 4, 1), ())
    with pytest.raises(OutOfMemoryError, match=message), _out_of_memory(topology):
        raise jax.errors.JaxRuntimeError(complaint)


def test_other_faults_of_the_compiler_are_not_hidden():
    topology = Topology("v5e:2x4", CHIPS["v5e"], (2, 4, 1), ())
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        _out_of_memory(topology),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_other_commands_are_silent_though_libtpu_is_installed(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    command = [sys.executable, str(ROOT / "run.py"), "show", *SMALL[1:]]
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert finished.stderr == b""
    assert b"mesh {'data': 1" in finished.stdout


# A TPU shows as a device file, or on the PCI bus by its vendor; 0x8086 is Intel.
@pytest.mark.parametrize(
    ("files", "vendors", "expected"),
    [
        ((), ("0x8086",), True),
        (("accel0",), (), False),
        (("vfio/0",), (), False),
        (("nvidia0",), (), False),
        ((), ("0x8086", "0x1ae0"), False),
    ],
)
def test_jax_is_kept_from_tpus_only_where_there_are_none(
    files, vendors, expected, tmp_path, monkeypatch
):
    for name in files:
        path = tmp_path / "dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for number, vendor in enumerate(vendors):
        folder = tmp_path / "sys/bus/pci/devices" / str(number)
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(options, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    assert options.libtpu_has_nothing_to_do() is expected
