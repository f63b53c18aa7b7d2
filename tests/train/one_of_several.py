"""One process of several: trains the small experiment in one folder after another.

    python one_of_several.py COORDINATOR NUM_PROCESSES PROCESS_ID FOLDER[:STEP] ...

Process 0 is killed after STEP.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
from small import experiment

from mtl_jax import optim
from mtl_jax.sharding import distributed
from mtl_jax.train import MeshShape, RunFolder, build_program, loop, train
from mtl_jax.train.program import Program
from mtl_jax.train.progress import ProgressDisplay

NUM_DEVICES = 4
PLACE = Program.place


def build():
    """Experts on all eight devices; the balancer's state has a PRNG key."""
    return build_program(
        experiment(
            num_routers=None,
            num_experts=8,
            mesh=MeshShape(data=1, expert=8),
            aggregator=optim.rlw,
            num_steps=4,
            evaluate_every=2,
            evaluation_examples=10,
        )
    )


def main(coordinator, num_processes, process_id, *folders):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    distributed.initialize(coordinator, int(num_processes), int(process_id))
    with distributed.leaving_at_once():
        program = build()
        compile_once(program)
        for item in folders:
            path, _, stop = item.partition(":")
            note_reads(Path(path) / f"read_{process_id}.jsonl")
            if stop and distributed.is_main():
                die_after(int(stop))
            folder = RunFolder(Path(path), writes=distributed.is_main())
            train(program, folder, "small")


def compile_once(program):
    step, evaluate = program.compile_step(), loop.make_evaluate(program)
    Program.compile_step = lambda self: step
    loop.make_evaluate = lambda program: evaluate


def note_reads(path):
    """Writes down which records this process reads for each step."""

    def noting(self, examples):
        if isinstance(examples, dict):
            indices = {name: part.index.tolist() for name, part in examples.items()}
            with path.open("a") as file:
                file.write(json.dumps(indices) + "\n")
        return PLACE(self, examples)

    Program.place = noting


def die_after(last_step):
    update = ProgressDisplay.update

    def dying(self, step, *arguments, **keywords):
        update(self, step, *arguments, **keywords)
        if step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    ProgressDisplay.update = dying


if __name__ == "__main__":
    main(*sys.argv[1:])
