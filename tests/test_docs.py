"""The examples in the documentation run, and the links outside it lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Pages that share a folder because one goes on from the other.
QUICK = (("README.md", "docs/quickstart.md"),)
SLOW = (
    ("docs/configs.md", "docs/sharding.md"),
    ("docs/experts.md", "docs/extend/router.md"),
    ("docs/data.md",),
    ("docs/pretrained.md",),
    ("docs/mod_squad.md",),
    ("docs/m3vit.md",),
    ("docs/export.md",),
    ("docs/extend/task.md",),
    ("docs/extend/source.md",),
    ("docs/extend/method.md",),
)
PAGES = (*QUICK, *(pytest.param(pages, marks=pytest.mark.slow) for pages in SLOW))

BLOCK = re.compile(
    r"^(?P<run><!-- run -->\n)?"
    r"```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

# Adds --smoke to training, which would take minutes otherwise.
COMMAND = """#!/bin/sh
case "$1 $*" in
    *--smoke*) ;;
    train\\ *) set -- "$@" --smoke ;;
esac
exec "{python}" "{root}/run.py" "$@"
"""


@pytest.fixture
def environment(tmp_path):
    """Where ``mtl-jax`` and ``mtl_jax`` are this source tree's.

    What one command of a page has compiled, the next need not compile again.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "mtl-jax"
    command.write_text(COMMAND.format(python=sys.executable, root=ROOT))
    command.chmod(0o755)
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


@pytest.mark.parametrize("pages", PAGES, ids=lambda pages: Path(pages[0]).stem)
def test_examples_run(pages, environment, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    executed = 0
    for page in pages:
        for block in BLOCK.finditer((ROOT / page).read_text()):
            if block["title"]:
                (folder / block["title"]).write_text(block["code"])
            elif block["run"]:
                run(block["language"], block["code"], folder, environment)
                executed += 1
    assert executed


def run(language, code, folder, environment):
    interpreter = {
        # Modules beside a script are found, as they are for `python script.py`.
        "python": [sys.executable, "-c"],
        "bash": ["bash", "-euo", "pipefail", "-c"],
    }[language]
    done = subprocess.run(
        [*interpreter, code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_every_marked_block_is_run():
    listed = {ROOT / page for pages in (*QUICK, *SLOW) for page in pages}
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        text = page.read_text()
        marks = len(re.findall(r"^<!-- run -->$", text, re.MULTILINE))
        assert marks == sum(bool(block["run"]) for block in BLOCK.finditer(text)), page
        assert not marks or page in listed, page


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    missing = [
        target
        for target in targets
        if "://" not in target and not (ROOT / target).exists()
    ]
    assert missing == []
