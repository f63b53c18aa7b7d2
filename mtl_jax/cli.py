"""The command line: ``mtl-jax train|eval|export|extract|show|compile|...``."""

import argparse
import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from mtl_jax.report import (
    comparison_table,
    format_table,
    results_table,
    write_comparison,
    write_report,
)

USER_ERROR = 2
INTERRUPTED = 130
PREEMPTED = 143
MAX_DEVICES = 1024
GOOGLE = "0x1ae0"  # as a vendor of PCI devices, such as TPUs


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 on success, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except BrokenPipeError:
        # Whoever reads the output, such as `head`, has seen enough. Python would
        # complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mtl-jax", description="Multitask learning at scale in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a config, or continue its run")
    _add_config_options(train)
    train.add_argument("--workdir", type=Path, help="run folder (runs/CONFIG)")
    _add_processes(train)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("eval", help="evaluate a run's checkpoint")
    evaluate.add_argument("run", type=Path, metavar="DIR")
    evaluate.add_argument("--step", type=int, help="checkpoint (the newest)")
    _add_trust(evaluate)
    _add_devices(evaluate)
    _add_processes(evaluate)
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
    _add_trust(export)
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
    _add_trust(extract)
    _add_devices(extract)
    extract.set_defaults(command=_extract)

    show = commands.add_parser("show", help="print a config and how it is sharded")
    _add_config_options(show)
    show.set_defaults(command=_show)

    compile_ = commands.add_parser(
        "compile", help="compile a config's step for TPUs that are not there"
    )
    _add_config_options(compile_)
    compile_.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5e:4x4, v5p:8x8x16"
    )
    compile_.add_argument(
        "--quick", action="store_true", help="compile in less time, less well"
    )
    compile_.add_argument(
        "--search", action="store_true", help="find the batch and remat that fit best"
    )
    compile_.add_argument(
        "--output", type=Path, help="JSON file (runs/compile/CONFIG-TOPOLOGY.json)"
    )
    compile_.set_defaults(command=_compile)

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
    return parser


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="config[:variant] or a file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="assignments",
        help="set a field by its dotted path; may be repeated",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="shrink to a few small steps"
    )
    parser.add_argument("--seed", type=int, help="same as --set seed=SEED")
    _add_devices(parser)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="let the saved config name what is in this module or .py file",
    )


def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices", type=int, metavar="N", help="pretend to have N CPU devices"
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes, one a host")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes of Cloud TPU, GKE, SLURM or Open MPI",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="elsewhere: address of process 0"
    )
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I", help="from 0 to N - 1")


def _train(options: argparse.Namespace) -> None:
    with _user_errors():
        configuration, config = _load(options)
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
            _user_errors((train.RunFolderError, OSError)),
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
    with _user_errors():
        page = write_report(workdir)
    print()
    print(format_table(results_table(result)))
    print(f"\nreport: {page}")


def _evaluate(options: argparse.Namespace) -> None:
    with _user_errors():
        _start_jax(options)
        program, folder = _open_run(options)
        from mtl_jax import train
        from mtl_jax.sharding import distributed

        distributed.check_same(folder.read_json("config.json"))
    with (
        distributed.leaving_at_once(),
        _user_errors((train.RunFolderError, OSError)),
    ):
        step, tasks = train.evaluate_run(program, folder, options.step)
    if not distributed.is_main():
        return
    print(format_table(results_table({"tasks": tasks})))
    print(f"\ncheckpoint of step {step}")


def _export(options: argparse.Namespace) -> None:
    with _user_errors():
        import jax

        # Nothing is computed, and layers choose what is right on every platform.
        jax.config.update("jax_platforms", "cpu")
        _start_jax(options)
        program, folder = _open_run(options, jax.devices()[:1])
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
    with _user_errors():
        _start_jax(options)
        program, folder = _open_run(options)
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


def _open_run(options: argparse.Namespace, devices: Any = None) -> tuple[Any, Any]:
    """The program and the folder of a run that there is already."""
    from mtl_jax import configuration, train
    from mtl_jax.sharding import distributed

    # Orbax would warn that it writes nothing to the run, as it was told.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not (options.run / "config.json").is_file():
        raise ValueError(f"{options.run} holds no run: it has no config.json")
    folder = train.RunFolder(options.run, writes=distributed.is_main())
    document = folder.read_json("config.json") or {}
    config = configuration.from_document(document, options.trust)
    experiment = configuration.build(config)
    train.validate(experiment)
    return train.build_program(experiment, devices), folder


def _show(options: argparse.Namespace) -> None:
    with _user_errors():
        configuration, config = _load(options)
        document = configuration.to_document(config, options.config)
        from mtl_jax import sharding, train
        from mtl_jax.train.program import count_parameters

        experiment = configuration.build(config)
        train.validate(experiment)
        program = train.build_program(experiment)
    for path, value in document["fields"].items():
        print(f"{path} = {value!r}")
    total, active = count_parameters(program)
    print(f"\n{total:,} parameters, {active:,} active for one task's example")
    print(f"mesh {dict(program.mesh.shape)}\n")
    rows = sharding.report(
        program.abstract_state.params, program.mesh, experiment.rules
    )
    print(sharding.format_report(rows))


def _compile(options: argparse.Namespace) -> None:
    from mtl_jax import scaling

    with _user_errors():
        if options.devices is not None:
            raise ValueError("compile takes its devices from --topology, not --devices")
        scaling.prepare_environment()
        configuration, config = _load(options)
        topology = scaling.make_topology(options.topology)
        name = configuration.full_name(options.config)
        from mtl_jax import train

        experiment = configuration.build(config)
        train.validate(experiment, runs_here=False)
        make = scaling.search if options.search else scaling.estimate
        estimate = make(experiment, topology, optimized=not options.quick)
        print(scaling.format_estimate(estimate))
        stem = f"{name}-{topology.name}".replace(":", "-")
        output = options.output or Path("runs/compile") / f"{stem}.json"
        scaling.write_estimate(estimate, output, name)
        print(f"\nsaved: {output}")


def _compare(options: argparse.Namespace) -> None:
    with _user_errors():
        table = comparison_table(options.runs)
        page = write_comparison(options.runs, options.output)
    print(table)
    print(f"\npage: {page}")


def _report(options: argparse.Namespace) -> None:
    with _user_errors():
        page = write_report(options.run, options.baselines)
    print(page)


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    _start_jax(options)
    from mtl_jax import configuration

    config = configuration.load_config(options.config, smoke=options.smoke)
    configuration.override(config, options.assignments)
    if options.seed is not None:
        config.seed = options.seed
    return configuration, config


def _start_jax(options: argparse.Namespace) -> None:
    """Lets JAX see the devices, those of other processes too, that the options name."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    chosen = jax.config.values["jax_platforms"]
    if chosen is None and _libtpu_has_nothing_to_do():
        jax.config.update("jax_platforms", "cpu")
    # No command has all of these options.
    chosen = vars(options)
    number = chosen.get("devices")
    if number is not None:
        if not 1 <= number <= MAX_DEVICES:
            raise ValueError(
                f"--devices is {number}; it must be at least 1 and at most "
                f"{MAX_DEVICES}"
            )
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", number)
    address = [
        chosen.get(name) for name in ("coordinator", "num_processes", "process_id")
    ]
    if chosen.get("distributed") or address != [None] * 3:
        from mtl_jax.sharding import distributed

        with distributed.leaving_at_once(), _user_errors():
            distributed.initialize(*address)
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(f"JAX has no devices: {error}") from error


def _libtpu_has_nothing_to_do() -> bool:
    """Whether libtpu is installed for `compile` alone: there is no accelerator.

    JAX would try it first, and it would complain at length.
    """
    if importlib.util.find_spec("libtpu") is None:
        return False
    devices = ("accel*", "vfio/*", "nvidia*", "kfd", "dxg")
    if any([*Path("/dev").glob(name)] for name in devices):
        return False
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return all(vendor.read_text().strip() != GOOGLE for vendor in vendors)


def _check_platform() -> None:
    """Refuses releases of JAX that compute wrong task gradients."""
    from mtl_jax.optim.canary import check_task_gradients

    try:
        check_task_gradients()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


@contextlib.contextmanager
def _user_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, OSError),
) -> Iterator[None]:
    """Turns what is wrong with the user's input into one line and status 2.

    Args:
      kinds: Exceptions that stand for it, by default those of the checks. Once all is
        checked and computing begins, another ValueError is a fault of the program,
        and its traceback should be seen.
    """
    try:
        yield
    except kinds as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"mtl-jax: error: {line}"
    )
    sys.exit(USER_ERROR)
