"""``mtl-jax train``: train a config, or continue its run."""

import argparse
import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtl_jax.cli.errors import (
    NUMERICAL_FAULT,
    fail,
    storage_is_quiet,
    user_errors,
)
from mtl_jax.cli.observers import (
    add_observers,
    check_observers,
    check_profile,
    make_observers,
)
from mtl_jax.cli.options import add_config_options, add_processes, load
from mtl_jax.report import format_table, results_table, write_report


def add(commands: Any) -> None:
    """Adds the commands of this module to the parser's."""
    train = commands.add_parser("train", help="train a config, or continue its run")
    add_config_options(train)
    train.add_argument("--workdir", type=Path, help="run folder (runs/CONFIG)")
    train.add_argument(
        "--fallback-dir",
        type=Path,
        metavar="DIR",
        help="where to save the run if its folder cannot be written any more",
    )
    train.add_argument(
        "--debug-nans",
        action="store_true",
        help="stop at the first faulty step and name what made a NaN",
    )
    add_processes(train)
    add_observers(train)
    train.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> None:
    with user_errors():
        check_observers(options)
        configuration, config = load(options)
        name = configuration.full_name(options.config)
        document = configuration.to_document(config, name)
        from mtl_jax import train
        from mtl_jax.sharding import distributed
        from mtl_jax.sharding.leaving import leaving_at_once

        _check_debug_nans(options)
        experiment = configuration.build(config)
        train.validate(experiment)
        program = train.build_program(experiment)
        program.local_rows(program.share_multiple)
        _check_platform()
        # They depend on the number of devices, and the order of the data on them.
        shares = experiment.mixture.examples_per_batch(program.share_multiple)
        for source, share in shares.items():
            document["fields"][f"mixture.examples_per_batch.{source}"] = share
        document["mesh"] = dict(program.mesh.shape)
        workdir = options.workdir or Path("runs") / name.replace(":", "-")
        initialize = experiment.initialize
        if initialize is not None and not (workdir / "config.json").exists():
            train.check_initialize(initialize, program.abstract_params())
        check_profile(options.profile, experiment.num_steps, workdir)
        fallback = None
        finished = (workdir / "result.json").exists()
        distributed.check_same([str(options.fallback_dir), finished])
        if options.fallback_dir is not None and not finished:
            train.check_fallback(options.fallback_dir, workdir)
            fallback = train.Fallback(options.fallback_dir, document)
        # Made only now: a mistake leaves no folder behind.
        folder = train.RunFolder(workdir, writes=distributed.is_main())
        _, result = _look(folder, document)
    if result is None:
        stopped_by, fault = 0, None
        with (
            leaving_at_once(),
            user_errors((train.RunFolderError, OSError)),
            _ending_together(),
            storage_is_quiet(),
            train.StopSignals() as signals,
            train.locked(workdir),
        ):
            with user_errors():
                distributed.check_shared(workdir)
                # Another command may have trained while this one waited for the lock.
                saved, result = _look(folder, document)
            try:
                if result is None:
                    if saved is not None and distributed.is_main():
                        _tell_of_mesh(saved.get("mesh"), document["mesh"])
                    folder.write_json("config.json", document)
                    result = train.train(
                        program,
                        folder,
                        name,
                        make_observers(options, name, document, experiment, folder),
                        signals=signals,
                        fallback=fallback,
                        debug_nans=options.debug_nans,
                    )
            except train.StoppedError as error:
                stopped_by = error.number
            except train.NumericalFaultError as error:
                fault = error
        if fault is not None:
            fail(_with_command(fault), NUMERICAL_FAULT)
        if result is None:
            name = signal.Signals(stopped_by).name
            print(f"\nstopped by {name}, and saved; the same command continues")
            # Only here: several processes end together.
            sys.exit(train.STATUS + stopped_by)
    elif distributed.is_main():
        print(f"{workdir} holds a finished run; nothing to train.")
    if not distributed.is_main():
        return
    with user_errors():
        page = write_report(workdir)
    print()
    print(format_table(results_table(result)))
    print(f"\nreport: {page}")


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """Lets several processes end together that cannot write the run folder any more.

    Else JAX would abort those that end a little later than process 0.
    """
    import jax

    from mtl_jax import train

    try:
        yield
    except train.UnwritableError:
        if jax.distributed.is_initialized():
            # Where another one is lost, what there is to say is the same.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.distributed.shutdown()
        raise


def _look(
    folder: Any, document: Mapping[str, Any]
) -> tuple[Mapping[str, Any] | None, dict[str, Any] | None]:
    """Config and result of the run that a folder holds, each None if there is none.

    Args:
      folder: The `mtl_jax.train.RunFolder`.
      document: Content of the ``config.json`` of what is to be trained there.

    Raises:
      ValueError: If the run, or the newest of its checkpoints, is of another config, a
        file is damaged, or processes find different things.
    """
    from mtl_jax import train
    from mtl_jax.sharding import distributed

    saved, result = map(folder.read_json, ("config.json", "result.json"))
    if saved is not None:
        _check_unchanged(f"{folder.path} holds a run", saved, document)
    # That file may be lost, or not be that of the run.
    found = train.saved_config(folder.path / train.CHECKPOINTS)
    if found is not None:
        checkpoint, config = found
        _check_unchanged(f"the checkpoint {checkpoint} is", config, document)
        saved = saved or config
    distributed.check_same([document, saved, result])
    return saved, result


def _check_unchanged(
    what: str, saved: Mapping[str, Any], document: Mapping[str, Any]
) -> None:
    """Refuses to continue what is of another config, but for the mesh."""
    from mtl_jax import configuration

    changed = [
        line
        for line in configuration.differences(saved, document)
        if not line.startswith("mesh.")
    ]
    if changed:
        more = f"; and {len(changed) - 10} more" if len(changed) > 10 else ""
        raise ValueError(
            f"{what} of another config; choose another --workdir, or undo these "
            f"differences: {'; '.join(changed[:10])}{more}"
        )


def _check_debug_nans(options: argparse.Namespace) -> None:
    import jax

    if options.debug_nans and jax.process_count() > 1:
        raise ValueError(
            f"--debug-nans follows one process and there are {jax.process_count()}; "
            "leave it out, or train in one"
        )


def _with_command(fault: Any) -> str:
    """What stopped a run, with what leads there again, which is saved too."""
    from mtl_jax.sharding import distributed

    if fault.reproducer is None:
        return str(fault)
    # The first NaN is looked for in a single process.
    several = argparse.ArgumentParser(add_help=False)
    add_processes(several)
    _, others = several.parse_known_args(sys.argv[1:])
    command = shlex.join(["mtl-jax", *others, "--debug-nans"])
    if distributed.is_main():
        (fault.reproducer / "command.txt").write_text(command + "\n")
    return f"{fault}; this goes there again and names the operation: {command}"


def _tell_of_mesh(old: dict[str, int] | None, new: dict[str, int]) -> None:
    """Says that a run continues on another mesh, if it does."""
    if old != new:
        was, now = (
            ", ".join(f"{axis}={size}" for axis, size in (mesh or {}).items())
            for mesh in (old, new)
        )
        print(f"continues on the mesh {now}, where it was {was or 'unknown'}")


def _check_platform() -> None:
    """Refuses releases of JAX that compute wrong task gradients."""
    from mtl_jax.optim.canary import check_task_gradients

    try:
        check_task_gradients()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
