"""What is installed: the wheel's contents, the version, and light imports."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mtl_jax

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_all_that_a_run_needs(wheel):
    names = set(wheel.namelist())
    for folder, pattern, place in [
        (ROOT / "mtl_jax", "**/*.py", "mtl_jax"),
        (ROOT / "mtl_jax", "data/arrays/*.npz", "mtl_jax"),
        (ROOT / "mtl_jax", "data/arrays/LICENSES.md", "mtl_jax"),
        (ROOT / "mtl_jax", "report/templates/*", "mtl_jax"),
        (ROOT / "configs", "*.py", "mtl_jax/configs"),
    ]:
        needed = {
            f"{place}/{path.relative_to(folder).as_posix()}"
            for path in folder.glob(pattern)
        }
        assert needed
        assert needed <= names


def test_wheel_holds_nothing_else(wheel):
    suffixes = {".py", ".npz", ".md", ".html", ".css"}
    for name in wheel.namelist():
        top, *_ = Path(name).parts
        if top.endswith(".dist-info"):
            continue
        assert top == "mtl_jax"
        assert Path(name).suffix in suffixes, name


def test_wheel_names_version_licences_and_command(wheel):
    information = f"mtl_jax-{mtl_jax.__version__}.dist-info"
    names = wheel.namelist()
    assert f"{information}/licenses/LICENSE" in names
    assert f"{information}/licenses/mtl_jax/data/arrays/LICENSES.md" in names
    metadata = wheel.read(f"{information}/METADATA").decode()
    assert f"\nVersion: {mtl_jax.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    command = wheel.read(f"{information}/entry_points.txt").decode()
    assert "mtl-jax = mtl_jax.cli:main" in command


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("mtl_jax.report", {"jax", "flax", "optax", "orbax", "grain", "fiddle"}),
        ("mtl_jax.optim", {"flax", "orbax", "grain", "fiddle", "matplotlib"}),
        ("mtl_jax.data.sources.earth", {"tensorflow", "tensorflow_datasets"}),
    ],
)
def test_imports_are_light(module, unwanted):
    code = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert unwanted & set(done.stdout.split()) == set()


def test_help_needs_no_jax():
    code = (
        "import sys\n"
        "from mtl_jax.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as exit:\n    assert exit.code == 0\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
