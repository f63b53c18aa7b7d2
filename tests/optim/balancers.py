"""The table of balancers that the balancing tests share, and how they are run.

A new balancer needs one entry here.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import optim

# Arguments that make states change within a few steps.
BALANCERS = {
    "awl": {},
    "dwa": {"window": 2},
    "equal": {},
    "famo": {"minimum_losses": -0.5},
    "gls": {},
    "imtl_l": {},
    "rlw": {"seed": 3},
    "scale_invariant": {},
    "stch": {"mu": 0.5, "warmup_steps": 3, "nadir_steps": 2},
    "task_prioritization": {"gamma": 2.0},
    "uncertainty": {"form": "classification"},
    "uw_so": {"temperature": 0.7},
}
NUM_STEPS = 8


def precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def tolerance(dtype):
    return 2e-5 if dtype == np.float32 else 1e-11


def make(name, num_tasks, **arguments):
    return getattr(optim, name)(num_tasks, **(arguments or BALANCERS[name]))


def make_losses(num_tasks=5, num_steps=NUM_STEPS, seed=0):
    """Positive losses over two orders of magnitude, one row a step."""
    rng = np.random.default_rng([seed, num_tasks])
    return np.exp(rng.normal(size=(num_steps, num_tasks)))


class Runner:
    """A balancer and one jitted step of it: weigh, then observe."""

    def __init__(self, name, num_tasks, arguments):
        self.balancer = make(name, num_tasks, **dict(arguments))
        self.num_traces = 0
        self.step = jax.jit(self._step)

    def _step(self, losses, after, state, active):
        self.num_traces += 1
        weights, state = self.balancer.weights(losses, state, active)
        if self.balancer.observe is not None:
            state = self.balancer.observe(after, state, active)
        return weights, state


@functools.cache
def runner(name, num_tasks, dtype, arguments):
    # Of one type each, so that a second trace is a fault.
    del dtype
    return Runner(name, num_tasks, arguments)


def run(name, losses, active=None, state=None, dtype=np.float32, **arguments):
    """Weights `[steps, tasks]`, and the states before and after every step.

    What is observed after a step are the losses of the next, and those of the first
    after the last.
    """
    num_tasks = losses.shape[1]
    active = np.ones(losses.shape, bool) if active is None else active
    with precision(dtype):
        one = runner(name, num_tasks, dtype, tuple(arguments.items()))
        states = [one.balancer.init() if state is None else state]
        rows = [jnp.asarray(row, dtype) for row in losses]
        weights = []
        for row, after, present in zip(rows, rows[1:] + rows[:1], active, strict=True):
            values, state = one.step(row, after, states[-1], jnp.asarray(present))
            assert values.dtype == dtype
            weights.append(np.asarray(values, np.float64))
            states.append(state)
    return np.array(weights), states


def numbers(tree):
    """The leaves as arrays of NumPy, a key as its data."""

    def number(leaf):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if typed else leaf)

    return [number(leaf) for leaf in jax.tree.leaves(tree)]
