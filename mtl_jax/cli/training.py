"""``mtl-jax train``: train a config, or continue its run."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mtl_jax.cli.errors import user_errors
from mtl_jax.cli.options import add_config_options, add_processes, load
from mtl_jax.report import format_table, results_table, write_report

INTERRUPTED = 130
PREEMPTED = 143


def add(commands: Any) -> None:
    """Adds the commands of this module to the parser's."""
    train = commands.add_parser("train", help="train a config, or continue its run")
    add_config_options(train)
    train.add_argument("--workdir", type=Path, help="run folder (runs/CONFIG)")
    add_processes(train)
    train.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> None:
    with user_errors():
        configuration, config = load(options)
        name = configuration.full_name(options.config)
        document = configuration.to_document(config, name)
        from mtl_jax import train
        from mtl_jax.sharding import distributed

        experiment = configuration.build(config)
        train.validate(experiment)
        program = train.build_program(experiment)
        _check_platform()
        # They depend on the number of devices, and the order of the data on them.
        shares = experiment.mixture.examples_per_batch(program.share_multiple)
        for source, share in shares.items():
            document["fields"][f"mixture.examples_per_batch.{source}"] = share
        workdir = options.workdir or Path("runs") / name.replace(":", "-")
        initialize = experiment.initialize
        if initialize is not None and not (workdir / "config.json").exists():
            train.check_initialize(initialize, program.abstract_params())
        # Made only now: a mistake leaves no folder behind.
        folder = train.RunFolder(workdir, writes=distributed.is_main())
        saved = folder.read_json("config.json")
        if saved is not None:
            changed = configuration.differences(saved, document)
            if changed:
                more = f"; and {len(changed) - 10} more" if len(changed) > 10 else ""
                raise ValueError(
                    f"{workdir} holds a run of another config; choose another "
                    "--workdir, or undo these differences: "
                    f"{'; '.join(changed[:10])}{more}"
                )
        result = folder.read_json("result.json")
        distributed.check_same([document, saved, result])
        distributed.check_shared(workdir)
    if result is None:
        with (
            distributed.leaving_at_once(),
            user_errors((train.RunFolderError, OSError)),
        ):
            folder.write_json("config.json", document)
            try:
                result = train.train(program, folder, name)
            except KeyboardInterrupt:
                print("\nstopped; the same command continues from the last checkpoint")
                sys.exit(INTERRUPTED)
            except train.PreemptedError:
                print("\npre-empted, and saved; the same command continues")
        if result is None:
            sys.exit(PREEMPTED)
    elif distributed.is_main():
        print(f"{workdir} holds a finished run; nothing to train.")
    if not distributed.is_main():
        return
    with user_errors():
        page = write_report(workdir)
    print()
    print(format_table(results_table(result)))
    print(f"\nreport: {page}")


def _check_platform() -> None:
    """Refuses releases of JAX that compute wrong task gradients."""
    from mtl_jax.optim.canary import check_task_gradients

    try:
        check_task_gradients()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
