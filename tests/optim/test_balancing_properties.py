"""What holds for every balancer: absent tasks, types, resuming, extreme losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balancers import (
    BALANCERS,
    NUM_STEPS,
    make,
    make_losses,
    numbers,
    run,
    runner,
    tolerance,
)

from mtl_jax import optim

# Methods for which a task without a positive loss is absent.
LOGARITHMIC = ("gls", "scale_invariant", "stch", "uw_so")
every_balancer = pytest.mark.parametrize("name", BALANCERS)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@every_dtype
@every_balancer
def test_inactive_tasks_are_absent(name, dtype):
    losses = make_losses()
    kept = np.array([0, 2, 3])
    active = np.isin(np.arange(5), kept)
    # What an absent task's loss holds does not matter.
    losses[:, 1], losses[:, 4] = np.nan, np.inf
    mask = np.tile(active, (NUM_STEPS, 1))
    weights, states = run(name, losses, mask, dtype=dtype)
    np.testing.assert_array_equal(weights[:, ~active], 0)
    if name == "rlw":
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        return
    expected, fewer_states = run(name, losses[:, kept], dtype=dtype)
    np.testing.assert_allclose(weights[:, kept], expected, rtol=tolerance(dtype))
    for leaf, first, fewer in zip(
        *map(numbers, (states[-1], states[0], fewer_states[-1])), strict=True
    ):
        np.testing.assert_allclose(leaf[kept], fewer, atol=tolerance(dtype))
        np.testing.assert_array_equal(leaf[~active], first[~active])


@every_balancer
def test_absence_leaves_a_task_as_it_was(name):
    # Task 0 is away in the middle; what it had learned is what it comes back to.
    losses = make_losses()
    mask = np.ones((NUM_STEPS, 5), bool)
    mask[3:6, 0] = False
    weights, states = run(name, losses, mask)
    np.testing.assert_array_equal(weights[3:6, 0], 0)
    assert np.all(weights[mask] > 0)
    if name != "rlw":
        for before, after in zip(numbers(states[3]), numbers(states[6]), strict=True):
            np.testing.assert_array_equal(after[0], before[0])


@every_balancer
def test_no_active_task_gives_zero_and_changes_nothing(name):
    _, [*_, state] = run(name, make_losses())
    mask = np.zeros((NUM_STEPS, 5), bool)
    weights, states = run(name, make_losses(seed=1), mask, state)
    np.testing.assert_array_equal(weights, 0)
    if name != "rlw":
        for before, after in zip(numbers(state), numbers(states[-1]), strict=True):
            np.testing.assert_array_equal(after, before)


@every_dtype
@pytest.mark.parametrize("name", sorted(set(BALANCERS) - {"rlw"}))
def test_permutation_equivariance(name, dtype):
    losses = make_losses()
    permutation = np.array([3, 0, 4, 1, 2])
    weights, _ = run(name, losses, dtype=dtype)
    permuted, _ = run(name, losses[:, permutation], dtype=dtype)
    np.testing.assert_allclose(permuted, weights[:, permutation], rtol=tolerance(dtype))


@every_balancer
def test_resumes_bit_for_bit(name):
    losses = make_losses()
    weights, states = run(name, losses)
    again, _ = run(name, losses)
    np.testing.assert_array_equal(weights, again)
    copied = jax.tree.map(
        lambda leaf: (
            jax.random.wrap_key_data(np.array(jax.random.key_data(leaf)))
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else np.array(leaf)
        ),
        states[4],
    )
    resumed, resumed_states = run(name, losses[4:], state=copied)
    np.testing.assert_array_equal(resumed, weights[4:])
    # What is observed after the last step differs.
    pairs = zip(numbers(resumed_states[-2]), numbers(states[-2]), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


@every_balancer
def test_compiles_once(name):
    mask = np.ones((NUM_STEPS, 5), bool)
    mask[2:4, 1] = False
    run(name, make_losses(), mask)
    assert runner(name, 5, np.float32, ()).num_traces == 1


@every_balancer
def test_state_keeps_its_types_whatever_the_losses_are(name):
    with jax.enable_x64(True):
        balancer = make(name, 3)
        state = balancer.init()
        types = jax.tree.map(jax.typeof, state)
        for given, expected in (
            (jnp.bfloat16, jnp.float32),
            (jnp.float32, jnp.float32),
            (jnp.float64, jnp.float64),
        ):
            losses = jnp.array([1, 2, 3], given)
            weights, after = jax.eval_shape(balancer.weights, losses, state)
            assert weights.dtype == expected
            assert jax.tree.map(jax.typeof, after) == types
            if balancer.observe is not None:
                after = jax.eval_shape(balancer.observe, losses, state)
                assert jax.tree.map(jax.typeof, after) == types


def test_losses_are_constants():
    balancer = optim.scale_invariant(2)

    def objective(losses):
        weights, _ = balancer.weights(losses, balancer.init(), None)
        return jnp.sum(weights * losses)

    derivatives = jax.grad(objective)(jnp.array([0.5, 4.0]))
    np.testing.assert_allclose(derivatives, [2, 0.25])


@every_dtype
@every_balancer
def test_extreme_losses_give_finite_weights(name, dtype):
    huge, small = (1e30, 1e-30) if dtype == np.float32 else (1e300, 1e-300)
    rows = [
        [0, 0, 0],
        [0, 1, 2],
        [-1, 1, 2],
        [-huge, 0, huge],
        [small, 1, huge],
        [huge, huge, huge],
        [huge, -huge, 0],
        [small, small, small],
        [np.inf, 1, np.inf],
        [np.inf, 0, -np.inf],
        [np.finfo(dtype).smallest_subnormal, 1, 0],
        [np.finfo(dtype).max, np.finfo(dtype).max, np.finfo(dtype).tiny],
    ]
    losses = np.repeat(np.array(rows, dtype), 3, axis=0)
    weights, states = run(name, losses, dtype=dtype)
    assert np.all(np.isfinite(weights))
    assert np.all(weights >= 0)
    for leaf in numbers(states[-1]):
        assert np.all(np.isfinite(leaf))
    # And the balancer has not been broken by them.
    later, _ = run(name, make_losses(3), state=states[-1], dtype=dtype)
    assert np.all(later[-1] > 0)


@pytest.mark.parametrize("name", ["famo", "gls", "scale_invariant", "stch"])
def test_extreme_losses_keep_their_digits(name):
    losses = np.tile([1e-30, 1.0, 1e30], (5, 1))
    losses[4] = [1e-29, 2.0, 1e30]
    wide, _ = run(name, losses, dtype=np.float64)
    narrow, _ = run(name, losses)
    np.testing.assert_allclose(narrow, wide, rtol=2e-5)
    if name == "gls":
        np.testing.assert_allclose(narrow[0] * 3, [1e30, 1, 1e-30], rtol=2e-5)


@pytest.mark.parametrize("loss", [0.0, -2.0, 1e-40])
@pytest.mark.parametrize("name", LOGARITHMIC)
def test_without_a_logarithm_a_task_is_absent(name, loss):
    _, [*_, state] = run(name, make_losses())
    losses = make_losses(seed=1)
    losses[:, 2] = loss
    weights, _ = run(name, losses, state=state)
    mask = np.ones((NUM_STEPS, 5), bool)
    mask[:, 2] = False
    expected, _ = run(name, losses, mask, state)
    np.testing.assert_array_equal(weights, expected)
    assert np.all(weights[mask] > 0)


@pytest.mark.parametrize("name", ["dwa", "rlw", "uncertainty"])
def test_from_balancer_weighs_task_gradients(name):
    rng = np.random.default_rng(0)
    gradients = {"kernel": rng.normal(size=(5, 4, 2)), "bias": rng.normal(size=(5, 2))}
    gradients = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradients)
    aggregator = optim.from_balancer(make(name, 5), 5)
    update, state = jax.jit(aggregator.update), aggregator.init(None)
    losses, active = make_losses(), np.ones((NUM_STEPS, 5), bool)
    active[1:3, 2] = False
    expected, _ = run(name, losses, active)
    for row, present, weights in zip(losses, active, expected, strict=True):
        row, present = jnp.asarray(row, jnp.float32), jnp.asarray(present)
        gradient, state = update(gradients, state, losses=row, active=present)
        np.testing.assert_allclose(state.weights, weights, rtol=1e-5)
        for key, leaf in gradients.items():
            total = np.tensordot(weights, np.asarray(leaf), axes=1)
            np.testing.assert_allclose(gradient[key], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.equal(0), "num_tasks is 0"),
        (lambda: optim.uncertainty(2, form="ranking"), "form is 'ranking'"),
        (lambda: optim.uncertainty(2, form=["regression"]), "each of the 2 tasks"),
        (lambda: optim.imtl_l(2, learning_rate=-1), "learning_rate is -1"),
        (lambda: optim.famo(2, weight_decay=-1), "weight_decay is -1"),
        (lambda: optim.famo(2, minimum_losses=[0.0]), "minimum_losses has shape"),
        (lambda: optim.uw_so(2, temperature=0), "temperature is 0"),
        (lambda: optim.dwa(2, temperature=0), "temperature is 0"),
        (lambda: optim.dwa(2, window=0), "window is 0"),
        (lambda: optim.stch(2, warmup_steps=0), "nadir_steps is 0"),
        (lambda: optim.stch(2, warmup_steps=2, nadir_steps=3), "nadir_steps is 3"),
        (lambda: optim.stch(2, warmup_steps=2, mu=0), "mu is 0"),
        (lambda: optim.task_prioritization(2, gamma=-1), "gamma is -1"),
        (lambda: optim.task_prioritization(2, decay=1), "decay is 1"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_number_of_losses_is_refused():
    with pytest.raises(ValueError, match="the losses of its 3 tasks"):
        optim.gls(3).weights(jnp.ones(2), None)
