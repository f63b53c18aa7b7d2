"""One process of several: meets faults, trains to its end and to the first of them.

    python faulty_of_several.py COORDINATOR NUM_PROCESSES PROCESS_ID FOLDER

Prints why the second run stopped.
"""

import dataclasses
import sys
from pathlib import Path

import jax
from faulty import BIG_LOSS, NAN_GRADIENT, NAN_LOSS, faulty_experiment

from mtl_jax import optim
from mtl_jax.sharding import distributed
from mtl_jax.sharding.leaving import leaving_at_once
from mtl_jax.train import (
    MeshShape,
    NumericalFaultError,
    RunFolder,
    build_program,
    faults,
    loop,
    train,
)
from mtl_jax.train.program import Program

NUM_DEVICES = 4
STEPS = 20
TROUBLE = ((5, NAN_LOSS), (40, NAN_GRADIENT), (17, BIG_LOSS))


def run_both(parent):
    """Trains in two folders; returns why the second run stopped."""
    # So that the few steps have spikes.
    faults.FEWEST = 4
    program = build_program(
        faulty_experiment(
            trouble=TROUBLE,
            aggregator=optim.pcgrad,
            mesh=MeshShape(),
            num_steps=STEPS,
            log_every=4,
            evaluate_every=STEPS,
            checkpoint_every=8,
        )
    )
    step, evaluate = program.compile_step(), loop.make_evaluate(program)
    Program.compile_step = lambda self: step
    loop.make_evaluate = lambda program: evaluate
    train(program, RunFolder(parent / "whole", writes=distributed.is_main()), "faulty")
    chosen = dataclasses.replace(program.experiment, max_faulty_steps=1)
    impatient = dataclasses.replace(program, experiment=chosen)
    folder = RunFolder(parent / "stopped", writes=distributed.is_main())
    try:
        train(impatient, folder, "faulty")
    except NumericalFaultError as error:
        return str(error)
    raise AssertionError


def main(coordinator, num_processes, process_id, folder):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_traceback_in_locations_limit", 1)
    distributed.initialize(coordinator, int(num_processes), int(process_id))
    with leaving_at_once():
        print(run_both(Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
