import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faulty import (
    BIG_LOSS,
    INFINITE_LOSS,
    NAN_GRADIENT,
    NAN_LOSS,
    faulty_experiment,
    troubled,
    with_target,
    without_labels,
)

from mtl_jax import optim
from mtl_jax.data import training_batches
from mtl_jax.train import NumericalFaultError, build_program
from mtl_jax.train.debug_nans import explaining
from mtl_jax.train.faults import (
    DEVIATIONS,
    FEWEST,
    REPORT,
    WINDOW,
    FaultReport,
    must_skip,
    no_faults,
    take_note,
)
from mtl_jax.train.gradients import Evaluation

TARGETS = (NAN_LOSS, INFINITE_LOSS, NAN_GRADIENT)
plain_sgd = functools.partial(lambda num_steps: optax.sgd(0.1))
sharpness = functools.partial(optim.sharpness_aware, rho=0.05)

KINDS = {
    "surgery": {"aggregator": optim.pcgrad},
    "features": {"aggregator": optim.mgda, "gradients_at": "features"},
    "rows": {"aggregator": optim.moco},
    "balancer": {"aggregator": optim.famo},
    "sharpness": {"sharpness": sharpness, "aggregator": optim.cagrad},
}
SLOW = ("features", "rows", "balancer", "sharpness")


@functools.cache
def setup(kind, **fields):
    chosen = faulty_experiment(optimizer=plain_sgd, **(KINDS.get(kind, {}) | fields))
    program = build_program(chosen, jax.devices()[:1])
    batch = first_batch(program)
    with program.scope():
        step = jax.jit(program.step).lower(program.init_state(), batch).compile()
    return program, step, batch


def first_batch(program):
    chosen = program.experiment
    fields = {task.name: task.field for task in chosen.tasks}
    batches = training_batches(chosen.mixture, fields, 0, program.share_multiple)
    return program.place(next(batches))


def arrays(tree):
    def to_array(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    return jax.tree.map(to_array, tree)


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, arrays(ours), arrays(theirs))


def kept(state):
    """What a step that is skipped leaves as it was."""
    return (
        state.params,
        state.aggregator_state,
        state.optimizer_state,
        state.collections,
    )


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS],
)
def test_a_task_left_out_is_a_task_without_labels(kind):
    program, step, batch = setup(kind)
    # Heads start at zero, and pass no gradient on in the first step.
    state, _ = step(program.init_state(), batch)
    expected, masked = step(state, without_labels(batch, "tiles"))
    for target in TARGETS:
        ours, metrics = step(state, with_target(batch, 3, target))
        assert_same(kept(ours), kept(expected))
        assert metrics["redness/left_out"] == 1
        assert metrics["phase/left_out"] == 0
        assert metrics["all/skipped_steps"] == 0
        for name in ("all/loss", "all/gradient_norm", "phase/gradient_norm"):
            assert np.isfinite(metrics[name])
            np.testing.assert_array_equal(metrics[name], masked[name])
    for before, after in zip(
        jax.tree.leaves(state.params["heads"]["redness"]),
        jax.tree.leaves(ours.params["heads"]["redness"]),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)
    # A task that is at no fault takes part again.
    again, metrics = step(ours, batch)
    assert metrics["redness/left_out"] == 0
    head = again.params["heads"]["redness"]
    moved = optax.tree.norm(optax.tree.sub(head, ours.params["heads"]["redness"]))
    assert moved > 0


@functools.cache
def setup_of_numbers():
    """A plain sum at features, of a source whose inputs are floating-point numbers."""
    chosen = faulty_experiment(optimizer=plain_sgd, gradients_at="features")
    program = build_program(chosen, jax.devices()[:1])
    sound = with_pixel(first_batch(program), 1.0)
    with program.scope():
        step = jax.jit(program.step).lower(program.init_state(), sound).compile()
    return program, step, sound


def with_pixel(batch, value):
    """The batch with floating-point inputs of the tiles, one of which is given."""
    tiles = batch["tiles"]
    inputs = jnp.asarray(tiles.inputs, jnp.float32).at[2, 0, 0, 0].set(value)
    return {**batch, "tiles": dataclasses.replace(tiles, inputs=inputs)}


def test_the_others_move_by_their_own_gradients():
    """By the definition: the gradient of the sum of the other tasks' losses."""
    program, step, batch = setup_of_numbers()
    state, _ = step(program.init_state(), batch)
    key = jax.random.fold_in(state.key, state.step)

    def others(params):
        losses, _ = program.objective.losses(params, batch, key, state.collections)
        return losses[1] + losses[2]

    gradient = jax.jit(jax.grad(others))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    ours, _ = step(state, with_target(batch, 0, INFINITE_LOSS))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        ours.params,
        expected,
    )


def test_an_input_that_is_not_finite_leaves_out_what_its_source_labels():
    program, step, sound = setup_of_numbers()
    state, _ = step(program.init_state(), sound)
    expected, _ = step(state, without_labels(sound, "tiles"))
    ours, metrics = step(state, with_pixel(sound, jnp.nan))
    assert metrics["redness/left_out"] == 1
    assert metrics["all/skipped_steps"] == 0
    assert_same(kept(ours), kept(expected))


def test_a_step_with_nobody_left_is_skipped():
    program, step, batch = setup("surgery")
    state, _ = step(program.init_state(), batch)
    alone = without_labels(batch, "stripes")
    ours, metrics = step(state, with_target(alone, 1, NAN_LOSS))
    assert metrics["all/skipped_steps"] == 1
    assert_same(kept(ours), kept(state))
    assert ours.step == state.step + 1
    # Without any label at all nothing is at fault.
    _, metrics = step(state, without_labels(alone, "tiles"))
    assert metrics["all/skipped_steps"] == 0


@pytest.mark.slow
def test_skipping_changes_nothing_but_the_number_of_the_step():
    program, step, batch = setup("balancer", non_finite="skip")
    state, _ = step(program.init_state(), batch)
    ours, metrics = step(state, with_target(batch, 3, NAN_GRADIENT))
    assert_same(kept(ours), kept(state))
    assert ours.step == state.step + 1
    assert metrics["redness/left_out"] == 1
    assert metrics["all/skipped_steps"] == 1
    assert np.isfinite(metrics["all/parameter_norm"])
    after, metrics = step(ours, batch)
    assert metrics["all/skipped_steps"] == 0
    assert optax.tree.norm(optax.tree.sub(after.params, ours.params)) > 0
    report = FaultReport(*np.asarray(metrics[REPORT]))
    assert report.in_a_row[0] == 0
    assert report.skipped_steps[0] == 1


def test_a_task_that_is_rare_is_counted_by_its_own_steps():
    program, step, batch = setup("surgery")
    state, found = program.init_state(), []
    for turn in (NAN_LOSS, None, NAN_LOSS, None, None, NAN_LOSS, 0.5, None):
        chosen = without_labels(batch, "tiles")
        if turn is not None:
            chosen = with_target(batch, 3, turn)
        state, metrics = step(state, chosen)
        report = FaultReport(*np.asarray(metrics[REPORT]))
        found.append((report.in_a_row[0], *report.task_in_a_row))
    assert found == [
        *((1, 1, 0, 0), (0, 1, 0, 0), (1, 2, 0, 0), (0, 2, 0, 0), (0, 2, 0, 0)),
        *((1, 3, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
    ]


def evaluation(**fields):
    defaults = {
        "losses": jnp.ones(3),
        "auxiliary_loss": jnp.float32(0.0),
        "active": jnp.array([True, True, False]),
        "faulty": jnp.zeros(3, bool),
        "gramian": jnp.eye(3),
        "statistics": {},
        "aggregator_state": {"weights": jnp.ones(3), "steps": jnp.int32(4)},
        "collections": {"bias": jnp.zeros(4)},
    }
    return Evaluation(**(defaults | fields))


FAULTY = jnp.array([False, False, True])


@pytest.mark.parametrize(
    ("fields", "norm", "policy", "skips"),
    [
        ({}, 1.0, "skip", False),
        ({}, jnp.inf, "leave_out", True),
        ({}, jnp.nan, "leave_out", True),
        ({"auxiliary_loss": jnp.float32(jnp.nan)}, 1.0, "leave_out", True),
        ({"collections": {"bias": jnp.full(4, jnp.inf)}}, 1.0, "leave_out", True),
        (
            {"aggregator_state": {"weights": jnp.full(3, jnp.nan), "steps": 4}},
            1.0,
            "leave_out",
            True,
        ),
        ({"faulty": FAULTY}, 1.0, "leave_out", False),
        ({"faulty": FAULTY}, 1.0, "skip", True),
        # No label at all is no fault; a fault in all that are labelled is.
        ({"active": jnp.zeros(3, bool)}, 1.0, "leave_out", False),
        ({"active": jnp.zeros(3, bool), "faulty": FAULTY}, 1.0, "leave_out", True),
    ],
)
def test_what_skips_a_step(fields, norm, policy, skips):
    fields = jax.tree.map(jnp.asarray, fields)
    before = evaluation()
    kept_before = before.aggregator_state, before.collections
    found = must_skip(evaluation(**fields), jnp.float32(norm), kept_before, policy)
    assert bool(found) is skips


def test_what_was_infinite_before_is_no_fault():
    endless = {"best": jnp.full(3, jnp.inf)}
    assert not must_skip(
        evaluation(aggregator_state=endless),
        jnp.float32(1.0),
        (endless, evaluation().collections),
        "leave_out",
    )


def test_spikes_by_brute_force():
    """Each loss against its own latest hundred, in float64, one step at a time."""
    rng = np.random.default_rng(0)
    steps, names = 260, 3
    losses = rng.normal(2.0, 0.1, (steps, names)).astype(np.float32)
    losses[150, 0], losses[200, 0], losses[20, 1], losses[90, 2] = 9.0, 9.0, 9.0, np.nan
    losses[:, 1] = np.where(losses[:, 1] == 9.0, 9.0, 1.5)
    losses[220, 1], losses[230, 1] = 1.58, 1.65
    present = rng.random((steps, names)) < 0.9
    present[[150, 200, 220, 230], [0, 0, 1, 1]] = True
    faulty = ~np.isfinite(losses) & present
    skipped = rng.random(steps) < 0.05

    @jax.jit
    def note(state, losses, active, faulty, skipped):
        learnt = evaluation(losses=losses, active=active, faulty=faulty)
        return take_note(state, learnt, skipped, jnp.float32(1.0))

    state, reports = no_faults(names), []
    for t in range(steps):
        active = present[t] & ~faulty[t]
        state, packed = note(state, losses[t], active, faulty[t], skipped[t])
        reports.append(FaultReport(*np.asarray(packed)))

    in_a_row = 0
    labelled = present | faulty
    for k in range(names):
        row = 0
        for t in np.flatnonzero(labelled[:, k]):
            row = row + 1 if faulty[t, k] else 0
            # Until the next step with a label of the task.
            until = t + 1
            while until < steps and not labelled[until, k]:
                until += 1
            assert {int(r.task_in_a_row[k]) for r in reports[t:until]} == {row}
    for t, report in enumerate(reports):
        in_a_row = in_a_row + 1 if faulty[t].any() or skipped[t] else 0
        assert report.in_a_row[0] == in_a_row
        assert report.skipped_steps[0] == skipped[: t + 1].sum()
        np.testing.assert_array_equal(report.left_out, faulty[: t + 1].sum(0))
        for k in range(names):
            seen = losses[:t, k][present[:t, k] & ~faulty[:t, k]][-WINDOW:]
            seen = seen.astype(np.float64)
            if len(seen) < FEWEST:
                assert not report.spike[k]
                continue
            deviation = max(seen.std(ddof=1), 0.01 * seen.mean())
            limit = seen.mean() + DEVIATIONS * deviation
            np.testing.assert_allclose(report.mean[k], seen.mean(), rtol=1e-5)
            np.testing.assert_allclose(report.limit[k], limit, rtol=1e-4)
            assert report.spike[k] == (present[t, k] and losses[t, k] > limit)
    found = [(t, k) for t, r in enumerate(reports) for k in np.flatnonzero(r.spike)]
    assert (150, 0) in found
    assert (230, 1) in found
    assert (220, 1) not in found


@pytest.mark.slow
def test_the_first_nan_is_named_with_its_line():
    program, _, batch = setup("surgery")
    compiled = setup("surgery")[1]
    names = [task.name for task in program.experiment.tasks]
    step = explaining(compiled, program.step, names, program.scope)
    # Targets without a label are NaN, and no fault.
    state, metrics = step(program.init_state(), batch)
    assert np.isfinite(metrics["all/loss"])
    lines, first = inspect.getsourcelines(troubled)
    (line,) = (first + i for i, text in enumerate(lines) if "jnp.log" in text)
    where = (
        r"numbers of 'redness' are not finite at step 2: the first NaN is made by the "
        rf"primitive log at .*/faulty\.py:{line} \(troubled\)"
    )
    with pytest.raises(NumericalFaultError, match=where):
        step(state, with_target(batch, 1, NAN_LOSS))
    # A loss that is big is none either.
    step(state, with_target(batch, 1, BIG_LOSS))
