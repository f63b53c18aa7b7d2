"""The table of row methods that test_rows.py holds to one set of properties.

A new method needs one entry here.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import optim
from mtl_jax.optim import db_mtl, excess_mtl, graddrop, moco, trimmed_mean

NUM_TASKS = 4
SHAPES = {"bias": (5,), "gain": (), "kernel": (3, 2)}
NUM_PARAMS = 12

# What follows are the methods again, one task and one step at a time, in float64. Each
# is a generator: send it (rows, losses, active), get the direction.


def db_mtl_loop(num_tasks, beta=0.9, sigma=0.0):
    averages, steps, direction = {}, dict.fromkeys(range(num_tasks), 0), None
    while True:
        rows, losses, active = yield direction
        present = np.flatnonzero(active & (losses > 0))
        for k in present:
            steps[k] += 1
            rate = beta * steps[k] ** -sigma
            before = averages.get(k, np.zeros(rows.shape[1]))
            averages[k] = rate * before + (1 - rate) * rows[k] / losses[k]
        lengths = {k: np.linalg.norm(averages[k]) for k in present}
        direction = np.zeros(rows.shape[1])
        for k in present:
            if lengths[k] > 0:
                direction += max(lengths.values()) * averages[k] / lengths[k]


def moco_loop(num_tasks, beta=0.5, beta_sigma=0.5, gamma=0.1, gamma_sigma=0.5, rho=0.0):
    weights, tracked = np.full(num_tasks, 1 / num_tasks), {}
    steps, step, direction = dict.fromkeys(range(num_tasks), 0), 0, None
    while True:
        rows, losses, active = yield direction
        present = np.flatnonzero(active)
        if len(present) == 0:
            direction = np.zeros(rows.shape[1])
            continue
        step += 1
        for k in present:
            steps[k] += 1
            length = np.linalg.norm(rows[k])
            target = max(losses[k], 0) * rows[k] / length if length else 0 * rows[k]
            rate = beta / steps[k] ** beta_sigma
            tracked[k] = (1 - rate) * tracked.get(k, 0 * rows[k]) + rate * target
        matrix = np.array([tracked[k] for k in present])
        share = weights[present].sum()
        start = weights[present] / share
        slope = matrix @ (matrix.T @ start) + rho * start
        powers = np.exp(start - gamma / step**gamma_sigma * slope)
        weights[present] = share * powers / powers.sum()
        direction = powers / powers.sum() @ matrix


def excess_mtl_loop(num_tasks, learning_rate=1e-2):
    weights, squares, baseline, direction = np.ones(num_tasks), {}, {}, None
    while True:
        rows, _, active = yield direction
        present = np.flatnonzero(active)
        if len(present) == 0:
            direction = np.zeros(rows.shape[1])
            continue
        before = weights[present].sum()
        for k in present:
            squares[k] = squares.get(k, 0) + rows[k] ** 2
            seen = squares[k] > 0
            risk = np.sum(rows[k][seen] ** 2 / np.sqrt(squares[k][seen]))
            if risk > 0:
                baseline.setdefault(k, risk)
                weights[k] *= np.exp(learning_rate * risk / baseline[k])
        weights[present] *= before / weights[present].sum()
        shares = weights[present] / weights[present].sum()
        direction = len(present) * shares @ rows[present]


def trimmed_mean_loop(num_tasks, trim=1):
    direction = None
    while True:
        rows, _, active = yield direction
        direction = np.zeros(rows.shape[1])
        for p in range(rows.shape[1]) if any(active) else ():
            entries = sorted(rows[active, p])
            for _ in range(trim):
                entries = entries[1:-1] if len(entries) > 2 else entries
            direction[p] = np.mean(entries)


class RowMethod(NamedTuple):
    """One entry: how to make a method and what to hold it to.

    Attributes:
        make: num_tasks -> aggregator.
        loop: num_tasks -> generator as above; None for a random method.
        outcomes: First direction for `[g, 0]`, `[g, g]`, `[g, -g]` as multiples of `g`,
            `|g| = 5`, losses 1; None where it is random.
        collectives: How many reductions over devices an update may do.
    """

    make: Callable[..., optim.Aggregator]
    loop: Callable[..., Any] | None
    outcomes: tuple[float | None, ...]
    collectives: int


# DB-MTL's first average is (1 − 0.9) g. MoCo's first y is ½ g / 5 where the loss is 1;
# beside a zero row, G = [[¼, 0], [0, 0]], so that λ_1 = sigmoid(−0.1 · ⅛). The weights
# of ExcessMTL beside a zero row are 2 sigmoid(±0.01). Two tasks leave nothing to trim.
METHODS = {
    "graddrop": RowMethod(graddrop, None, (1, 2, None), 0),
    "db_mtl": RowMethod(db_mtl, db_mtl_loop, (0.1, 0.2, 0), 1),
    "moco": RowMethod(moco, moco_loop, (0.1 / (1 + np.exp(0.0125)), 0.1, 0), 2),
    "excess_mtl": RowMethod(
        excess_mtl, excess_mtl_loop, (2 / (1 + np.exp(-0.01)), 2, 0), 1
    ),
    "trimmed_mean": RowMethod(trimmed_mean, trimmed_mean_loop, (0.5, 1, 0), 0),
}
REMEMBERING = ["db_mtl", "moco", "excess_mtl"]


def precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def to_tree(rows, dtype):
    """Split the last axis into leaves of a few shapes."""
    tree, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        leaf = rows[..., start : start + size].reshape((*rows.shape[:-1], *shape))
        tree[name], start = jnp.asarray(leaf, dtype), start + size
    return tree


def to_flat(tree):
    return np.concatenate(
        [np.asarray(leaf, np.float64).ravel() for leaf in tree.values()]
    )


@functools.cache
def jitted(name, num_tasks, options=()):
    aggregator = METHODS[name].make(num_tasks, **dict(options))
    return jax.jit(aggregator.init), jax.jit(aggregator.update)


def run(name, rows, losses=None, active=None, dtype=np.float32, state=None, **options):
    """Directions `[steps, params]` and last state, of rows `[steps, tasks, params]`."""
    steps, num_tasks, num_params = rows.shape
    losses = np.ones((steps, num_tasks)) if losses is None else losses
    active = np.ones((steps, num_tasks), bool) if active is None else active
    with precision(dtype):
        init, update = jitted(name, num_tasks, tuple(options.items()))
        if state is None:
            state = init(to_tree(np.zeros(num_params), dtype))
        directions = []
        for row, loss, present in zip(rows, losses, active, strict=True):
            direction, state = update(
                to_tree(row, dtype),
                state,
                losses=jnp.asarray(loss, dtype),
                active=jnp.asarray(present),
            )
            assert {leaf.dtype for leaf in direction.values()} == {np.dtype(dtype)}
            directions.append(to_flat(direction))
    return np.array(directions), state


def make_sequence(steps=6, num_tasks=NUM_TASKS, ratio=1.0, seed=0):
    """Rows whose norms spread over a ratio, positive losses, and who is there."""
    rng = np.random.default_rng([seed, steps, num_tasks])
    rows = rng.normal(size=(steps, num_tasks, NUM_PARAMS))
    rows *= rng.permutation(np.geomspace(1, ratio, num_tasks))[:, None]
    losses = rng.uniform(0.2, 3, size=(steps, num_tasks))
    active = rng.uniform(size=(steps, num_tasks)) < 0.6
    active[0], active[1] = True, False
    return rows, losses, active


def assert_close(result, expected, dtype=np.float32, relative=None):
    """Relative to the largest entry of each direction."""
    relative = relative or (2e-5 if dtype == np.float32 else 1e-12)
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    assert np.all(np.abs(result - expected) <= relative * scale)
