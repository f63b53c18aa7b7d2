"""``mtl-jax show|compile``: what a config is, and what it would cost."""

import argparse
from pathlib import Path
from typing import Any

from mtl_jax.cli.errors import user_errors
from mtl_jax.cli.options import add_config_options, load


def add(commands: Any) -> None:
    """Adds the commands of this module to the parser's."""
    show = commands.add_parser("show", help="print a config and how it is sharded")
    add_config_options(show)
    show.set_defaults(command=_show)

    compile_ = commands.add_parser(
        "compile", help="compile a config's step for TPUs that are not there"
    )
    add_config_options(compile_)
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


def _show(options: argparse.Namespace) -> None:
    with user_errors():
        configuration, config = load(options)
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

    with user_errors():
        if options.devices is not None:
            raise ValueError("compile takes its devices from --topology, not --devices")
        scaling.prepare_environment()
        configuration, config = load(options)
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
