"""``mtl-jax compare|report``: pages about finished runs."""

import argparse
from pathlib import Path
from typing import Any

from mtl_jax.cli.errors import user_errors
from mtl_jax.report import comparison_table, write_comparison, write_report


def add(commands: Any) -> None:
    """Adds the commands of this module to the parser's."""
    compare = commands.add_parser("compare", help="compare finished runs by delta-m")
    compare.add_argument("runs", type=Path, nargs="+", metavar="DIR")
    compare.add_argument("--output", type=Path, default=Path("comparison.html"))
    compare.set_defaults(command=_compare)

    report = commands.add_parser("report", help="write a run's report.html again")
    report.add_argument("run", type=Path, metavar="DIR")
    report.add_argument(
        "--baselines",
        type=Path,
        nargs="*",
        default=[],
        metavar="DIR",
        help="single-task runs to compare with",
    )
    report.set_defaults(command=_report)


def _compare(options: argparse.Namespace) -> None:
    with user_errors():
        table = comparison_table(options.runs)
        page = write_comparison(options.runs, options.output)
    print(table)
    print(f"\npage: {page}")


def _report(options: argparse.Namespace) -> None:
    with user_errors():
        page = write_report(options.run, options.baselines)
    print(page)
