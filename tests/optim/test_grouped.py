"""Aggregators on groups of parameters, against plain loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from loops import (
    BLOCKS,
    MASKS,
    cast,
    close,
    divisors,
    every_dtype,
    first,
    flat,
    make_steps,
    mgda_weights,
    momentum_loop,
    precision,
    run,
    share,
    share_weights,
)

from mtl_jax import optim


@every_dtype
def test_grouped_matches_loop(dtype):
    steps = make_steps(3, len(MASKS))
    aggregator = optim.grouped(optim.mgda, 3, r"(block_\d+)/")
    with precision(dtype):
        directions, states = run(aggregator, steps, dtype, MASKS)
    for t, task_gradients in enumerate(steps):
        for prefix, name in zip(BLOCKS, ("block_0", "block_1"), strict=True):
            rows = flat(task_gradients, prefix)
            weights = mgda_weights(rows, MASKS[t])
            close(states[t][name].weights, weights, dtype)
            close(flat(directions[t], prefix, tasks=False), weights @ rows, dtype)
        rest = np.array(MASKS[t], float) @ flat(task_gradients, "heads")
        close(flat(directions[t], "heads", tasks=False), rest, dtype)


def test_groups_draw_apart():
    num_tasks, num_steps, seed = 5, 3, 7
    steps = make_steps(num_tasks, num_steps)
    # The same gradients in both blocks: only the draws differ.
    for step in steps:
        step["trunk"]["block_1"] = step["trunk"]["block_0"]
    aggregator = optim.grouped(
        lambda k: optim.pcgrad(k, seed=seed), num_tasks, r"(block_\d)/"
    )
    directions, _ = run(aggregator, steps)
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(2)]
    for step, direction in zip(steps, directions, strict=True):
        results = []
        for i, prefix in enumerate(BLOCKS):
            keys[i], subkey = jax.random.split(keys[i])
            draws = jax.random.uniform(subkey, (num_tasks, num_tasks))
            orders = np.argsort(np.asarray(draws), axis=-1)
            results.append(flat(direction, prefix, tasks=False))
            expected = references.pcgrad(flat(step, prefix), orders)
            close(results[i], expected, np.float32, scale=10)
        assert np.abs(results[0] - results[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        (r"^trunk/", ["matched"]),
        (r"(block_\d)/", ["block_0", "block_1"]),
        (r"(kernel|bias)$", ["bias", "kernel"]),
        (r"^(\w+)/.*(kernel)", ["heads,kernel", "trunk,kernel"]),
        (r"^trunk/(block_1)?", ["block_1", "matched"]),
        (
            r"(trunk.+)",
            [
                f"trunk/block_{block}/{name}"
                for block in range(2)
                for name in ("bias", "kernel")
            ],
        ),
    ],
)
def test_group_names(pattern, groups):
    aggregator = optim.grouped(optim.sum, 2, pattern)
    [task_gradients] = make_steps(2, 1)
    task_gradients = cast(task_gradients, np.float32)
    state = aggregator.init(first(task_gradients))
    assert sorted(state) == groups
    direction, after = aggregator.update(task_gradients, state)
    assert list(after) == list(state)
    close(flat(direction, tasks=False), flat(task_gradients).sum(axis=0), np.float32)


def test_where_chooses_leaves():
    steps = make_steps(3, 2)
    masks = [(1, 1, 1), (1, 0, 1)]
    aggregator = optim.where(lambda path: path.endswith("kernel"), share(3))
    directions, states = run(aggregator, steps, masks=masks)
    for t, task_gradients in enumerate(steps):
        kernels = [f"{block}kernel" for block in (*BLOCKS, "heads/")]
        others = [f"{block}bias" for block in BLOCKS] + ["heads/gain"]
        rows = flat(task_gradients, *kernels)
        weights = share_weights(rows, masks[t])
        close(states[t]["matched"].weights, weights, np.float32)
        result = flat(directions[t], *kernels, tasks=False)
        close(result, weights @ rows, np.float32)
        rest = np.array(masks[t], float) @ flat(task_gradients, *others)
        close(flat(directions[t], *others, tasks=False), rest, np.float32)


def test_one_group_of_all_is_the_aggregator():
    steps = make_steps(4, 3)
    expected, expected_states = run(optim.pcgrad(4), steps)
    for aggregator in (
        optim.where(lambda _: True, optim.pcgrad(4)),
        optim.grouped(optim.pcgrad, 4, ""),
    ):
        directions, states = run(aggregator, steps)
        chex.assert_trees_all_equal(directions, expected)
        for state, other in zip(states, expected_states, strict=True):
            assert jnp.all(state["matched"].key == other.key)
            np.testing.assert_array_equal(state["matched"].weights, other.weights)


@every_dtype
def test_groups_of_normalized_averages(dtype):
    steps = make_steps(3, 4)
    losses = np.random.default_rng(1).uniform(0.5, 2, (4, 3))

    def make(num_tasks):
        return optim.momentum(optim.normalize(share(num_tasks), "loss+"), 0.5)

    chained = optim.chain_after(optim.grouped(make, 3, r"(block_\d)/"), optax.scale(-2))
    with precision(dtype):
        directions, _ = run(chained, steps, dtype, losses=losses)
    for prefix in BLOCKS:
        found = []
        for t, task_gradients in enumerate(steps):
            rows = flat(task_gradients, prefix)
            units = divisors("loss+", rows, losses[t])
            found.append(share_weights(rows / units[:, None]) / units)
        expected = momentum_loop(found, [(1, 1, 1)] * 4, 0.5)
        for t, task_gradients in enumerate(steps):
            result = flat(directions[t], prefix, tasks=False)
            close(result, -2 * expected[t] @ flat(task_gradients, prefix), dtype)


def test_random_methods_nest():
    # Draws come from each group's own key, and only where weights are refreshed.
    def make(num_tasks):
        return optim.every(optim.momentum(optim.pcgrad(num_tasks)), 2)

    steps = make_steps(4, 4)
    _, states = run(optim.grouped(make, 4, r"(block_\d)/"), steps)
    keys = [
        [
            jax.random.key_data(state[name].inner.inner.key).tolist()
            for name in ("block_0", "block_1")
        ]
        for state in states
    ]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert all(one != two for one, two in keys)


@pytest.mark.parametrize(
    "wrap",
    [lambda a: optim.where(lambda _: True, a), lambda a: optim.normalize(a, "l2")],
)
@pytest.mark.parametrize("shape", [(3, 3), ()])
def test_wrong_leading_axes_are_refused(wrap, shape):
    aggregator = wrap(optim.sum(2))
    state = aggregator.init({"bias": jnp.ones(()), "kernel": jnp.ones(3)})
    task_gradients = {"bias": jnp.ones(shape), "kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="leading axes"):
        aggregator.update(task_gradients, state)


def test_patterns_without_leaves_are_refused():
    [task_gradients] = make_steps(2, 1)
    params = first(cast(task_gradients, np.float32))
    message = r"pattern 'blok_' matches none of the 6 parameters.*'heads/gain'"
    with pytest.raises(ValueError, match=message):
        optim.grouped(optim.sum, 2, "blok_").init(params)
    with pytest.raises(ValueError, match=r"predicate chooses none .*'heads/gain'"):
        optim.where(lambda path: "blok" in path, optim.sum(2)).init(params)


def test_gradients_of_other_groups_are_refused():
    aggregator = optim.grouped(optim.sum, 2, r"(\w+)/kernel")
    state = aggregator.init({"one": {"kernel": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"groups \['two'\], the state has \['one'\]"):
        aggregator.update({"two": {"kernel": jnp.ones((2, 3))}}, state)


def test_sharded_groups_agree_and_gather_nothing():
    [task_gradients] = make_steps(3, 1)
    task_gradients = cast(task_gradients, np.float32)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def shardings(tree, leading):
        def of(leaf):
            spec = leading + (("fsdp",) if leaf.ndim > len(leading) else ())
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree.map(of, tree)

    aggregator = optim.grouped(lambda k: optim.momentum(share(k)), 3, r"(block_\d)/")
    state = aggregator.init(first(task_gradients))
    expected, expected_state = jax.jit(aggregator.update)(task_gradients, state)
    out = shardings(first(task_gradients), ())
    update = jax.jit(aggregator.update, out_shardings=(out, None))
    sharded = jax.device_put(task_gradients, shardings(task_gradients, (None,)))
    text = update.lower(sharded, state).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
    result, new_state = update(sharded, state)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-5)
    for name, group in expected_state.items():
        close(new_state[name].weights, group.weights, np.float32)
