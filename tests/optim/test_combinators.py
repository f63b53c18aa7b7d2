"""Combinators over the weights of an aggregator, against plain loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loops import (
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
from mtl_jax.optim.balancer import make_balancer


@every_dtype
def test_momentum_matches_loop(dtype):
    steps = make_steps(3, len(MASKS))
    with precision(dtype):
        directions, states = run(
            optim.momentum(share(3), decay=0.8), steps, dtype, MASKS
        )
    found = [share_weights(flat(g), m) for g, m in zip(steps, MASKS, strict=True)]
    expected = momentum_loop(found, MASKS, 0.8)
    # The third step is the third task's first: its weight is taken as it is.
    assert expected[2][2] == found[2][2] != 0
    for t, task_gradients in enumerate(steps):
        close(states[t].weights, expected[t], dtype)
        close(
            flat(directions[t], tasks=False), expected[t] @ flat(task_gradients), dtype
        )


def test_momentum_of_a_balancer():
    inverse = make_balancer(lambda losses, state, active: (1 / losses, state), 3)
    losses = np.array([[1.0, 2, 4], [2, 2, 2]])
    aggregator = optim.momentum(optim.from_balancer(inverse, 3), decay=0.5)
    _, states = run(aggregator, make_steps(3, 2), losses=losses)
    np.testing.assert_allclose(states[0].weights, [1, 0.5, 0.25])
    np.testing.assert_allclose(states[1].weights, [0.75, 0.5, 0.375])


def count_flops(aggregator, num_tasks, width):
    task_gradients = {"kernel": jnp.ones((num_tasks, width))}
    state = aggregator.init(first(task_gradients))
    arguments = (task_gradients, state, None)
    losses = jnp.ones(num_tasks)
    lowered = jax.jit(aggregator.update).lower(*arguments, losses=losses)
    return lowered.compile().cost_analysis()["flops"]


def test_directions_not_used_are_compiled_away():
    # A second weighted sum would cost num_tasks multiplications a column.
    num_tasks, width = 3, 10_000
    plain = count_flops(share(num_tasks), num_tasks, width)
    assert plain > 2 * num_tasks * width
    averaged = count_flops(optim.momentum(share(num_tasks)), num_tasks, width)
    assert averaged - plain < width
    # One division more for each number.
    normalized = optim.normalize(share(num_tasks), "loss")
    division = count_flops(normalized, num_tasks, width) - plain
    assert division < (num_tasks + 1) * width


# With n = 3: (which tasks are active, the step from which each one's weight is).
# Step 1 refreshes for the third task, which has no weight yet; 3 for the second, 4 for
# the first, whose weights are three steps old by then; 6 uses a weight of step 4.
SCHEDULE = [
    ((1, 1, 0), (0, 0, None)),
    ((1, 0, 1), (1, None, 1)),
    ((1, 1, 1), (1, 0, 1)),
    ((0, 1, 1), (None, 3, 3)),
    ((1, 1, 0), (4, 4, None)),
    ((0, 0, 0), (None, None, None)),
    ((1, 0, 0), (4, None, None)),
    ((1, 1, 1), (7, 7, 7)),
    ((1, 1, 1), (7, 7, 7)),
    ((1, 1, 1), (7, 7, 7)),
    ((1, 1, 1), (10, 10, 10)),
]


@every_dtype
def test_every_matches_schedule(dtype):
    steps = make_steps(3, len(SCHEDULE))
    masks = [mask for mask, _ in SCHEDULE]
    with precision(dtype):
        directions, states = run(optim.every(share(3), 3), steps, dtype, masks)
    found = [share_weights(flat(g), m) for g, m in zip(steps, masks, strict=True)]
    for t, (_, origins) in enumerate(SCHEDULE):
        expected = np.array(
            [0 if s is None else found[s][task] for task, s in enumerate(origins)]
        )
        close(states[t].weights, expected, dtype)
        close(flat(directions[t], tasks=False), expected @ flat(steps[t]), dtype)


def test_every_draws_in_refreshing_steps_alone():
    _, states = run(optim.every(optim.pcgrad(3), 3), make_steps(3, 7))
    keys = [jax.random.key_data(state.inner.key).tolist() for state in states]
    changed = [t for t in range(1, 7) if keys[t] != keys[t - 1]]
    assert changed == [3, 6]


def test_every_weighs_tasks_that_miss_its_turn():
    masks = [(1, 0), (0, 1)] * 3
    _, states = run(optim.every(share(2), 2), make_steps(2, 6), masks=masks)
    weights = np.array([state.weights for state in states])
    np.testing.assert_allclose(weights, masks, rtol=1e-6)


def test_every_keeps_the_gramian_within_the_condition():
    aggregator = optim.every(optim.mgda(3), 4)
    [task_gradients] = make_steps(3, 1)
    task_gradients = cast(task_gradients, np.float32)
    state = aggregator.init(first(task_gradients))
    jaxpr = jax.make_jaxpr(aggregator.update)(task_gradients, state)
    assert "dot_general" not in {str(eqn.primitive) for eqn in jaxpr.eqns}
    [condition] = [eqn for eqn in jaxpr.eqns if str(eqn.primitive) == "cond"]
    dots = [
        str(branch).count("dot_general[") for branch in condition.params["branches"]
    ]
    assert dots[0] == 0
    assert dots[1] >= len(jax.tree.leaves(task_gradients))


every_kind = pytest.mark.parametrize("kind", ["l2", "loss", "loss+"])


@every_dtype
@every_kind
@pytest.mark.parametrize("apply_to", ["normalized", "raw"])
def test_normalize_matches_loop(kind, apply_to, dtype):
    steps = make_steps(3, 3)
    masks = [(1, 1, 1), (1, 0, 1), (0, 0, 1)]
    losses = np.array([[0.5, 2, 30], [0.1, np.nan, 3], [np.inf, 0, 7]])
    aggregator = optim.normalize(share(3), kind, apply_to=apply_to)
    with precision(dtype):
        directions, states = run(aggregator, steps, dtype, masks, losses)
    for t, task_gradients in enumerate(steps):
        rows, mask = flat(task_gradients), np.array(masks[t], bool)
        units = np.where(mask, divisors(kind, rows, losses[t]), 1)
        found = share_weights(rows / units[:, None], mask)
        expected = found if apply_to == "raw" else found / units
        close(states[t].inner.weights, found, dtype)
        close(states[t].weights, expected, dtype)
        close(flat(directions[t], tasks=False), expected @ rows, dtype)


def test_normalize_by_nothing_is_the_aggregator():
    aggregator = optim.mgda(3)
    assert optim.normalize(aggregator, "none") is aggregator


def normalized_sum(rows, kind, losses=None, dtype=np.float32):
    """Direction and weights of one step, with sums that show every row."""
    aggregator = optim.normalize(optim.sum(len(rows)), kind)
    task_gradients = {"kernel": jnp.asarray(rows, dtype)}
    state = aggregator.init(first(task_gradients))
    losses = None if losses is None else jnp.asarray(losses, dtype)
    direction, state = aggregator.update(task_gradients, state, losses=losses)
    return np.asarray(direction["kernel"]), np.asarray(state.weights)


def test_normalize_treats_zeros_as_the_largest():
    rows = np.array([[3.0, 4], [0, 0], [0, 10]])
    direction, weights = normalized_sum(rows, "l2")
    np.testing.assert_allclose(weights, [0.2, 0.1, 0.1])
    np.testing.assert_allclose(direction, [0.6, 1.8], rtol=1e-6)
    # No loss left in the first, no gradient in the second.
    _, weights = normalized_sum(rows, "loss+", [0, 5, 2])
    np.testing.assert_allclose(weights, [0.05, 0.05, 0.05])
    # A negative loss keeps its gradient's sign.
    _, weights = normalized_sum(rows, "loss", [0.5, -4, 0])
    np.testing.assert_allclose(weights, [2, 0.25, 0.25])
    for kind in ("l2", "loss+"):
        direction, weights = normalized_sum(np.zeros((3, 2)), kind, [1, 2, 3])
        np.testing.assert_array_equal(direction, [0, 0])
        np.testing.assert_array_equal(weights, [1, 1, 1])


@every_dtype
@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_normalize_scale_law(scale, dtype):
    rows = np.random.default_rng(0).normal(size=(3, 5))
    sizes = scale * np.array([[1e-2], [1], [1e2]])
    with precision(dtype):
        # Scaling a task scales its loss and its gradient.
        for kind, factor in (("l2", 1), ("loss", 1), ("loss+", 1 / sizes[:, 0])):
            unit = rows / divisors(kind, rows, np.array([1.0, 2, 3]))[:, None]
            expected = np.sum(unit * np.reshape(factor, (-1, 1)), axis=0)
            losses = sizes[:, 0] * [1, 2, 3]
            result, _ = normalized_sum(sizes * rows, kind, losses, dtype)
            close(result, expected, dtype, scale=np.abs(expected).max())


@every_dtype
def test_momentum_over_every(dtype):
    steps = make_steps(3, 5)
    with precision(dtype):
        aggregator = optim.momentum(optim.every(optim.mgda(3), 2), decay=0.5)
        directions, states = run(aggregator, steps, dtype)
    found = [mgda_weights(flat(steps[t - t % 2]), [1, 1, 1]) for t in range(5)]
    expected = momentum_loop(found, [[1, 1, 1]] * 5, 0.5)
    for t, task_gradients in enumerate(steps):
        close(states[t].weights, expected[t], dtype)
        close(
            flat(directions[t], tasks=False), expected[t] @ flat(task_gradients), dtype
        )


def probe(num_tasks):
    """Sums another stack of gradients, given as a keyword, times a factor."""
    del num_tasks

    def update(task_gradients, state, params=None, *, second, factor, active=None, **_):
        del active
        chex.assert_trees_all_equal_shapes_and_dtypes(task_gradients, second)
        if params is not None:
            chex.assert_trees_all_equal_structs(task_gradients, params)
        total = jax.tree.map(lambda leaf: factor * jnp.sum(leaf, axis=0), second)
        return total, state

    return optim.Aggregator(lambda params: (), update)


def test_keywords_like_the_gradients_are_treated_like_them():
    one, two = (cast(step, np.float32) for step in make_steps(3, 2))
    params = first(one)
    keywords = {"second": two, "factor": jnp.asarray(2.0)}
    grouped = optim.grouped(probe, 3, r"(block_\d)/")
    direction, _ = grouped.update(one, grouped.init(params), params, **keywords)
    expected = 2 * flat(two, "trunk").sum(axis=0)
    close(flat(direction, "trunk", tasks=False), expected, np.float32)
    expected = flat(one, "heads").sum(axis=0)
    close(flat(direction, "heads", tasks=False), expected, np.float32)

    normalized = optim.normalize(probe(3), "l2")
    direction, _ = normalized.update(one, normalized.init(params), **keywords)
    lengths = np.linalg.norm(flat(one), axis=1)
    expected = 2 * (flat(two) / lengths[:, None]).sum(axis=0)
    close(flat(direction, tasks=False), expected, np.float32)


def rows_method(num_tasks):
    return optim.from_rows(
        lambda g, _: jax.tree.map(lambda leaf: jnp.max(leaf, axis=0), g), num_tasks
    )


def test_normalize_serves_row_methods():
    [task_gradients] = make_steps(3, 1)
    [direction], [state] = run(optim.normalize(rows_method(3), "l2"), [task_gradients])
    rows = flat(task_gradients)
    expected = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).max(axis=0)
    close(flat(direction, tasks=False), expected, np.float32)
    assert state.weights is None


@pytest.mark.parametrize(
    "wrap",
    [
        optim.momentum,
        lambda aggregator: optim.every(aggregator, 2),
        lambda aggregator: optim.normalize(aggregator, "l2", apply_to="raw"),
    ],
)
@pytest.mark.parametrize(
    "aggregator",
    [
        rows_method(2),
        optim.grouped(optim.mgda, 2, "kernel"),
        optim.where(lambda _: True, optim.mgda(2)),
        optim.chain_after(optim.mgda(2), optax.sgd(0.1)),
        optim.normalize(rows_method(2), "l2"),
    ],
)
def test_aggregators_without_weights_are_refused(wrap, aggregator):
    with pytest.raises(TypeError, match="gives each task one weight"):
        wrap(aggregator).init({"kernel": jnp.ones(3)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.momentum(optim.sum(2), decay=1.0), "decay is 1.0"),
        (lambda: optim.momentum(optim.sum(2), decay=-0.1), "decay is -0.1"),
        (lambda: optim.every(optim.sum(2), 0), "n is 0"),
        (lambda: optim.normalize(optim.sum(2), "l1"), "kind is 'l1'"),
        (lambda: optim.normalize(optim.sum(2), "l2", apply_to="x"), "apply_to is 'x'"),
        (lambda: optim.grouped(optim.sum, 0, ""), "num_tasks is 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_losses_are_refused():
    aggregator = optim.normalize(optim.sum(2), "loss")
    task_gradients = {"kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="losses is None"):
        aggregator.update(task_gradients, aggregator.init(first(task_gradients)))


@pytest.mark.parametrize(
    "init",
    [
        optim.dwa(3).init,
        *(
            lambda aggregator=aggregator: aggregator.init({"w": jnp.ones((4, 3))})
            for aggregator in (
                optim.gradvac(3),
                optim.pcd(3),
                optim.gradnorm(3),
                optim.modo(3),
                optim.sdmgrad(3),
                optim.moco(3),
                optim.db_mtl(3),
                optim.excess_mtl(3),
                optim.momentum(optim.mgda(3)),
                optim.every(optim.mgda(3), 2),
            )
        ),
    ],
)
def test_fresh_states_can_be_donated(init):
    # A buffer may be given away once: no two arrays of a state share theirs.
    jax.jit(lambda state: state, donate_argnums=0)(init())
