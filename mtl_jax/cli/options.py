"""What several commands share: their options, and what these stand for."""

import argparse
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from mtl_jax.cli.errors import user_errors

MAX_DEVICES = 1024
GOOGLE = "0x1ae0"  # as a vendor of PCI devices, such as TPUs


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Which config, and what differs from it."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="config[:variant], or a file: own.py[:variant], or a run's config.json",
    )
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
    add_trust(parser)
    add_devices(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Whose code a saved config may name."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="let a saved config name what is in this module or .py file",
    )


def add_devices(parser: argparse.ArgumentParser) -> None:
    """How many devices to make believe there are."""
    parser.add_argument(
        "--devices", type=int, metavar="N", help="pretend to have N CPU devices"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Which of several processes this is."""
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


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The module `mtl_jax.configuration`, and the config that the options name."""
    start_jax(options)
    from mtl_jax import configuration

    config = configuration.load_config(
        options.config, smoke=options.smoke, trust=options.trust
    )
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    configuration.override(config, [*options.assignments, *seed])
    return configuration, config


def open_run(options: argparse.Namespace, devices: Any = None) -> tuple[Any, Any]:
    """The program and the folder, which is only read, of a run that there is."""
    from mtl_jax import configuration, train

    # Orbax would warn that it writes nothing to the run, as it was told.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not (options.run / "config.json").is_file():
        raise ValueError(f"{options.run} holds no run: it has no config.json")
    folder = train.RunFolder(options.run, writes=False)
    document = folder.read_json("config.json") or {}
    config = configuration.from_document(document, options.trust)
    experiment = configuration.build(config)
    train.validate(experiment)
    return train.build_program(experiment, devices), folder


def start_jax(options: argparse.Namespace) -> None:
    """Lets JAX see the devices, those of other processes too, that the options name."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    chosen = jax.config.values["jax_platforms"]
    if chosen is None and libtpu_has_nothing_to_do():
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
        from mtl_jax.sharding.leaving import leaving_at_once

        with leaving_at_once(), user_errors():
            distributed.initialize(*address)
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(f"JAX has no devices: {error}") from error


def libtpu_has_nothing_to_do() -> bool:
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
