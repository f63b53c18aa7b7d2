"""Gradients of a small model over some steps, and plain loops to compare with."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from mtl_jax import optim

every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])

# Paths of the two groups of alike parameters.
BLOCKS = ("trunk/block_0/", "trunk/block_1/")
# The third task comes in the third step for the first time.
MASKS = [(1, 1, 0), (1, 0, 0), (1, 1, 1), (0, 1, 1), (0, 0, 0), (1, 0, 1)]


def precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def make_steps(num_tasks, num_steps):
    """Task gradients in float64, one tree a step."""
    rng = np.random.default_rng([num_tasks, num_steps])

    def rows(*shape):
        return rng.normal(size=(num_tasks, *shape))

    return [
        {
            "trunk": {
                f"block_{block}": {"kernel": rows(8, 3), "bias": rows(8)}
                for block in range(2)
            },
            "heads": {"kernel": rows(8, 2), "gain": rows()},
        }
        for _ in range(num_steps)
    ]


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def first(task_gradients):
    return jax.tree.map(lambda leaf: leaf[0], task_gradients)


def flat(tree, *prefixes, tasks=True):
    """Leaves whose paths have one of the prefixes, side by side; all by default."""
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith(prefixes or ""):
            leaf = np.asarray(leaf, np.float64)
            leaves.append(leaf.reshape(len(leaf), -1) if tasks else leaf.reshape(-1))
    return np.concatenate(leaves, axis=-1)


def close(result, expected, dtype, scale=1):
    tolerance = scale * (1e-5 if dtype == np.float32 else 1e-10)
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def run(aggregator, steps, dtype=np.float32, masks=None, losses=None):
    """Directions and states of all steps."""
    update, state = jax.jit(aggregator.update), None
    directions, states = [], []
    for t, step in enumerate(steps):
        task_gradients = cast(step, dtype)
        if state is None:
            state = aggregator.init(first(task_gradients))
        direction, state = update(
            task_gradients,
            state,
            losses=None if losses is None else jnp.asarray(losses[t], dtype),
            active=None if masks is None else jnp.asarray(masks[t], bool),
        )
        directions.append(direction)
        states.append(state)
    return directions, states


def share(num_tasks):
    """A method whose weights are easily told: each task's share of all squares."""

    def weigh(gramian, active):
        squares = jnp.where(active, jnp.diagonal(gramian), 0)
        total = jnp.sum(squares)
        return squares / jnp.where(total > 0, total, 1)

    return optim.from_weights(weigh, num_tasks)


def share_weights(rows, active=None):
    squares = np.sum(rows**2, axis=1)
    squares = squares if active is None else np.where(active, squares, 0)
    return squares / (squares.sum() or 1)


def mgda_weights(rows, active):
    """Weights of the shortest convex combination of independent rows."""
    kept, weights = np.flatnonzero(active), np.zeros(len(rows))
    if len(kept):
        point = references.mgda(rows[kept])
        weights[kept] = np.linalg.lstsq(rows[kept].T, point, rcond=None)[0]
    return weights


def momentum_loop(found, masks, decay):
    """Averages from each task's first weight on, 0 where it is inactive."""
    averages, results = {}, []
    for weights, mask in zip(found, masks, strict=True):
        results.append(np.zeros(len(weights)))
        for task in np.flatnonzero(mask):
            average = averages.get(task, weights[task])
            averages[task] = decay * average + (1 - decay) * weights[task]
            results[-1][task] = averages[task]
    return results


def divisors(kind, rows, losses):
    lengths = np.linalg.norm(rows, axis=1)
    return {"l2": lengths, "loss": losses, "loss+": lengths * losses}[kind]
