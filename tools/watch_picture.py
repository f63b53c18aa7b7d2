"""Draws what `mtl-jax watch` shows of a run, as a picture for the documentation.

It is run as `python tools/watch_picture.py runs/earth_digits watch.svg`.
"""

import argparse
import io
import re
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from mtl_jax.report.live import RunFollower
from mtl_jax.report.live_view import Frame

WIDTH = 100

# Pages ask no font server for anything.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def main() -> None:
    """Reads the command line, and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    console = Console(
        file=io.StringIO(),
        record=True,
        width=WIDTH,
        force_terminal=True,
        highlight=False,
    )
    console.print(Frame([RunFollower(options.run).look(time.time())]))
    console.save_svg(
        str(options.output),
        title=f"mtl-jax watch {options.run}",
        theme=MONOKAI,
        code_format=FORMAT,
        unique_id="watch",
    )


if __name__ == "__main__":
    main()
