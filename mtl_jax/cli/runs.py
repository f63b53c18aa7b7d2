"""``mtl-jax eval|export|extract``: what can be done with a run that there is."""

import argparse
from pathlib import Path
from typing import Any

from mtl_jax.cli.errors import user_errors
from mtl_jax.cli.options import (
    add_devices,
    add_processes,
    add_trust,
    open_run,
    start_jax,
)
from mtl_jax.report import format_table, results_table


def add(commands: Any) -> None:
    """Adds the commands of this module to the parser's."""
    evaluate = commands.add_parser("eval", help="evaluate a run's checkpoint")
    evaluate.add_argument("run", type=Path, metavar="DIR")
    evaluate.add_argument("--step", type=int, help="checkpoint (the newest)")
    add_trust(evaluate)
    add_devices(evaluate)
    add_processes(evaluate)
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser(
        "export", help="write one task's prediction as a program that needs JAX alone"
    )
    export.add_argument("run", type=Path, metavar="DIR")
    export.add_argument("--task", required=True, metavar="NAME")
    export.add_argument(
        "--output", type=Path, metavar="FILE", help="(DIR/NAME.jaxexport)"
    )
    export.add_argument("--step", type=int, help="checkpoint (the newest)")
    export.add_argument(
        "--batch", type=int, metavar="N", help="fix the number of images (any)"
    )
    add_trust(export)
    export.set_defaults(command=_export)

    extract = commands.add_parser(
        "extract", help="write a run of one task with the experts that it uses"
    )
    extract.add_argument("run", type=Path, metavar="DIR")
    extract.add_argument("--task", required=True, metavar="NAME")
    extract.add_argument("--output", type=Path, required=True, metavar="DIR")
    extract.add_argument(
        "--threshold",
        type=float,
        default=0.03,
        metavar="FRACTION",
        help="of its tokens that must go to an expert that is kept (0.03)",
    )
    extract.add_argument("--step", type=int, help="checkpoint (the newest)")
    add_trust(extract)
    add_devices(extract)
    extract.set_defaults(command=_extract)


def _evaluate(options: argparse.Namespace) -> None:
    with user_errors():
        start_jax(options)
        program, folder = open_run(options)
        from mtl_jax import train
        from mtl_jax.sharding import distributed
        from mtl_jax.sharding.leaving import leaving_at_once

        distributed.check_same(folder.read_json("config.json"))
    with (
        leaving_at_once(),
        user_errors((train.RunFolderError, OSError)),
    ):
        step, tasks = train.evaluate_run(program, folder, options.step)
    if not distributed.is_main():
        return
    print(format_table(results_table({"tasks": tasks})))
    print(f"\ncheckpoint of step {step}")


def _export(options: argparse.Namespace) -> None:
    with user_errors():
        import jax

        # Nothing is computed, and layers choose what is right on every platform.
        jax.config.update("jax_platforms", "cpu")
        start_jax(options)
        program, folder = open_run(options, jax.devices()[:1])
        from mtl_jax import train

        try:
            import flatbuffers  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "export needs the package flatbuffers: pip install 'mtl_jax[export]'"
            ) from error
        state = train.restore_run(program, folder, options.step)
        data, description = train.export_task(
            program, state, options.task, batch=options.batch
        )
        output = options.output or options.run / f"{options.task}.jaxexport"
        beside = train.write_export(output, data, description)
    print(f"{output}: {len(data) / 1e6:,.1f} MB, from the checkpoint of step", end=" ")
    print(f"{description['step']}\n{beside}: what it takes and gives")


def _extract(options: argparse.Namespace) -> None:
    with user_errors():
        start_jax(options)
        program, folder = open_run(options)
        from mtl_jax import extraction, train

        state = train.restore_run(program, folder, options.step)
        report = extraction.extract_run(
            program,
            state,
            folder,
            options.task,
            options.output,
            options.threshold,
            options.trust,
        )
    print(extraction.format_extraction(report))
    print(f"\nrun: {options.output}")
