"""The first steps of an experiment."""

import jax
import numpy as np

from mtl_jax.data import training_batches
from mtl_jax.train import build_program


def run(chosen, devices, num_steps):
    """Losses of the first steps, and the last parameters."""
    program = build_program(chosen, devices)
    step, _ = program.compile_step()
    return go_on(program, step, num_steps)


def go_on(program, step, num_steps):
    """Losses of the first steps, and the last parameters."""
    chosen, state = program.experiment, program.init_state()
    batches = training_batches(
        chosen.mixture,
        {task.name: task.field for task in chosen.tasks},
        chosen.seed,
        multiple_of=8,
    )
    losses = []
    for _ in range(num_steps):
        state, metrics = step(state, program.place(next(batches)))
        losses.append([float(metrics[f"{t.name}/loss"]) for t in chosen.tasks])
    return np.array(losses), jax.device_get(state.params)
