"""Each balancer by itself: published objectives, worked numbers, sequences, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balancers import NUM_STEPS, make, make_losses, run, tolerance

from mtl_jax import optim
from mtl_jax.optim.balancer import log_limit
from mtl_jax.optim.dwa import weights as dwa_weights
from mtl_jax.optim.famo import weights as famo_weights
from mtl_jax.optim.gls import weights as gls_weights
from mtl_jax.optim.learned import LearnedState
from mtl_jax.optim.stch import weights as stch_weights
from mtl_jax.optim.task_prioritization import weights as priority_weights
from mtl_jax.optim.uw_so import weights as uw_so_weights

every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])

# The published scalarised losses, of the losses and of what the balancer had learned
# when it weighed them. Products and powers, not logarithms, where the paper has them.


def famo_objective(losses, state):
    shares = jnp.exp(state.logits.values) / jnp.exp(state.logits.values).sum()
    distance = losses + 0.5 + 1e-8
    constant = jax.lax.stop_gradient(1 / (shares / distance).sum())
    return constant * (shares * jnp.log(distance)).sum()


OBJECTIVES = {
    "awl": lambda losses, state: (
        0.5 / state.values**2 * losses + jnp.log(1 + state.values**2)
    ).sum(),
    "equal": lambda losses, state: losses.sum(),
    "famo": famo_objective,
    "gls": lambda losses, state: losses.prod() ** (1 / losses.size),
    "imtl_l": lambda losses, state: (
        jnp.exp(state.values) * losses - state.values
    ).sum(),
    "scale_invariant": lambda losses, state: jnp.log(losses).sum(),
    "stch": lambda losses, state: (
        losses.size * 0.5 * jnp.log(((losses / state.nadir) ** 2).sum())
    ),
    "uncertainty": lambda losses, state: (
        jnp.exp(-state.values) * losses + 0.5 * state.values
    ).sum(),
}


@every_dtype
@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_are_the_derivatives_of_the_published_objective(name, dtype):
    losses = make_losses()
    weights, states = run(name, losses, dtype=dtype)
    with jax.enable_x64(True):
        # From step 3 on the warm-up of STCH is over.
        for index in range(3, NUM_STEPS):
            state = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), states[index])
            derivatives = jax.grad(OBJECTIVES[name])(jnp.asarray(losses[index]), state)
            np.testing.assert_allclose(
                weights[index], derivatives, rtol=tolerance(dtype)
            )


def test_uncertainty_takes_the_form_of_each_task():
    mixed = ("classification", "regression", "classification")
    losses = make_losses(3)
    weights, states = run("uncertainty", losses, form=mixed)
    for task, form in enumerate(mixed):
        alone, alone_states = run("uncertainty", losses[:, [task]], form=form)
        # Programs for three tasks and for one may round differently.
        np.testing.assert_allclose(weights[:, task], alone[:, 0], rtol=1e-6)
        np.testing.assert_allclose(
            states[-1].values[task], alone_states[-1].values[0], rtol=1e-6
        )
    np.testing.assert_allclose(weights[0], [1, 0.5, 1])


# Adam as published, on gradients of the published objectives.
LEARNED = {
    "awl": (1.0, {"learning_rate": 0.1}, OBJECTIVES["awl"]),
    "imtl_l": (0.0, {"learning_rate": 0.1}, OBJECTIVES["imtl_l"]),
    "uncertainty": (
        0.0,
        {"form": "regression", "learning_rate": 0.1},
        lambda losses, state: (
            0.5 * (jnp.exp(-state.values) * losses + state.values)
        ).sum(),
    ),
}


class NumpyAdam:
    def __init__(self, values, learning_rate, weight_decay=0.0):
        self.values, self.rate, self.decay = values, learning_rate, weight_decay
        self.first, self.second, self.count = 0 * values, 0 * values, 0

    def step(self, gradient):
        gradient = gradient + self.decay * self.values
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.999**self.count)
        self.values = self.values - self.rate * first / (np.sqrt(second) + 1e-8)


@every_dtype
@pytest.mark.parametrize("name", LEARNED)
def test_learned_numbers_follow_adam_on_the_objective(name, dtype):
    initial, arguments, objective = LEARNED[name]
    losses = make_losses()
    _, states = run(name, losses, dtype=dtype, **arguments)
    adam = NumpyAdam(np.full(5, initial), 0.1)
    with jax.enable_x64(True):
        for row, state in zip(losses, states[1:], strict=True):
            learned = LearnedState(jnp.asarray(adam.values), ())
            gradient = jax.grad(objective, argnums=1, allow_int=True)(
                jnp.asarray(row), learned
            )
            adam.step(np.asarray(gradient.values))
            np.testing.assert_allclose(
                state.values, adam.values, atol=10 * tolerance(dtype)
            )


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("uncertainty", {"form": "regression"}, np.log),
        ("uncertainty", {"form": "classification"}, lambda x: np.log(2 * x)),
        ("imtl_l", {}, lambda x: -np.log(x)),
        ("awl", {}, lambda x: np.sqrt((x + np.sqrt(x**2 + 8 * x)) / 4)),
    ],
)
def test_learned_numbers_settle_where_documented(name, arguments, expected):
    losses = np.array([0.3, 1.0, 4.0])
    _, states = run(name, np.tile(losses, (400, 1)), learning_rate=0.05, **arguments)
    np.testing.assert_allclose(states[-1].values, expected(losses), atol=5e-3)


def test_uw_so_worked_numbers():
    # exp(2), exp(1), exp(1/2) over their sum; at T = 2 their square roots.
    losses = np.array([[0.5, 1.0, 2.0]])
    for temperature, expected in (
        (1.0, (0.628532, 0.231224, 0.140244)),
        (2.0, (0.481024, 0.291756, 0.227220)),
    ):
        weights, _ = run("uw_so", losses, temperature=temperature)
        np.testing.assert_allclose(weights[0], expected, atol=1e-6)


def test_gls_worked_numbers():
    # The mean of 1 and 8 is √8: √8 / 2 and √8 / 16.
    weights, _ = run("gls", np.array([[1.0, 8.0]]))
    np.testing.assert_allclose(weights[0], [1.414214, 0.176777], atol=1e-6)


def test_dwa_worked_numbers():
    # Windows average (3, 4), (1.5, 4), so the ratios are 1/2 and 1; at T = 2 the
    # weights are 2 exp(1/4) and 2 exp(1/2) over exp(1/4) + exp(1/2).
    losses = np.array([[2.0, 4], [4, 4], [1, 3], [2, 5], [7, 1], [1, 1]])
    weights, _ = run("dwa", losses, window=2)
    np.testing.assert_array_equal(weights[:4], np.ones((4, 2)))
    expected = np.tile([0.875647, 1.124353], (2, 1))
    np.testing.assert_allclose(weights[4:], expected, atol=1e-6)


def test_stch_worked_numbers():
    # L / n = (1, 2). With mu = 1 the weights are K / (n sum L/n); with mu = 1/2 the
    # shares are 1/5 and 4/5, the weights 2 · 0.2 / 1 and 2 · 0.8 / 4.
    losses, nadir = jnp.array([1.0, 4.0]), jnp.array([1.0, 2.0])
    np.testing.assert_allclose(stch_weights(losses, nadir), [2 / 3, 1 / 3], rtol=1e-5)
    np.testing.assert_allclose(stch_weights(losses, nadir, mu=0.5), 0.4, rtol=1e-5)


def test_famo_worked_numbers():
    # Equal shares: the weights are those of 1 and 1/3. Then the first loss stays and
    # the second halves: the gradient is 1/2 (±½ log 2), and the first step of Adam is
    # its sign times the learning rate, towards the task that fell less.
    balancer = optim.famo(2)
    weights, state = balancer.weights(jnp.array([1.0, 3.0]), balancer.init(), None)
    np.testing.assert_allclose(weights, [0.75, 0.25], rtol=1e-6)
    state = balancer.observe(jnp.array([1.0, 1.5]), state, None)
    np.testing.assert_allclose(state.logits.values, [0.025, -0.025], rtol=1e-5)


def test_task_prioritization_worked_numbers():
    # κ = 1/2 and 1/4: ½ log 2 and ¾ log 4 at gamma = 1. Then with decay 1/2 and a loss
    # of 0: κ = 3/4 and 5/8.
    losses = np.array([np.log([2.0, 4.0]), [0.0, 0.0]])
    weights, _ = run("task_prioritization", losses, gamma=1.0, decay=0.5)
    np.testing.assert_allclose(weights[0], [0.346574, 1.039721], atol=1e-6)
    np.testing.assert_allclose(
        weights[1], [-np.log(3 / 4) / 4, -np.log(5 / 8) * 3 / 8], atol=1e-6
    )
    flat = priority_weights(jnp.array([0.5, 0.25]), gamma=0.0)
    np.testing.assert_allclose(flat, np.log([2.0, 4.0]), rtol=1e-6)


@every_dtype
def test_famo_sequence(dtype):
    losses, floor = make_losses(), np.array([-1.0, 0, 0.001, -0.2, 0])
    arguments = {"learning_rate": 0.1, "weight_decay": 0.1}
    weights, states = run(
        "famo", losses, dtype=dtype, minimum_losses=tuple(floor), **arguments
    )
    adam = NumpyAdam(np.zeros(5), **arguments)
    following = np.append(losses[1:], losses[:1], axis=0)
    for index, (before, after) in enumerate(zip(losses, following, strict=True)):
        shares = np.exp(adam.values) / np.exp(adam.values).sum()
        distance = before - floor + 1e-8
        expected = shares / distance / (shares / distance).sum()
        np.testing.assert_allclose(weights[index], expected, rtol=tolerance(dtype))
        fall = np.log(distance) - np.log(after - floor + 1e-8)
        jacobian = np.diag(shares) - np.outer(shares, shares)
        adam.step(jacobian @ fall)
        np.testing.assert_allclose(
            states[index + 1].logits.values, adam.values, atol=tolerance(dtype)
        )


@every_dtype
def test_dwa_sequence(dtype):
    losses = make_losses(num_steps=17)
    weights, _ = run("dwa", losses, dtype=dtype, window=4, temperature=0.5)
    for step in range(17):
        done = step // 4
        expected = np.ones(5)
        if done >= 2:
            latest = losses[4 * (done - 1) : 4 * done].mean(axis=0)
            previous = losses[4 * (done - 2) : 4 * (done - 1)].mean(axis=0)
            expected = np.exp(latest / previous / 0.5)
            expected *= 5 / expected.sum()
        np.testing.assert_allclose(weights[step], expected, rtol=5 * tolerance(dtype))


@every_dtype
def test_stch_sequence(dtype):
    losses = make_losses(num_steps=9)
    weights, states = run("stch", losses, dtype=dtype, warmup_steps=6, nadir_steps=None)
    np.testing.assert_allclose(weights[:6], 1 / losses[:6], rtol=tolerance(dtype))
    # By default a fifth of the warm-up, rounded up: its last 2 steps.
    nadir = losses[4:6].mean(axis=0)
    np.testing.assert_allclose(states[-1].nadir, nadir, rtol=tolerance(dtype))
    expected = 5 / (nadir * (losses[6:] / nadir).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(weights[6:], expected, rtol=tolerance(dtype))


def test_rlw_draws_softmax_of_normal_numbers():
    weights, _ = run("rlw", np.ones((2, 4000)), seed=0)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    # Logarithms up to a constant: moments 1, 0 and 3 of a normal distribution, and
    # consecutive draws independent.
    logits = np.log(weights)
    logits -= logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose((logits**2).mean(axis=1), 1, atol=0.1)
    np.testing.assert_allclose((logits**3).mean(axis=1), 0, atol=0.2)
    np.testing.assert_allclose((logits**4).mean(axis=1), 3, atol=0.5)
    assert abs(np.corrcoef(logits)[0, 1]) < 0.06
    other, _ = run("rlw", np.ones((1, 4000)), seed=1)
    assert abs(np.corrcoef(np.log(other), np.log(weights[:1]))[0, 1]) < 0.06


@pytest.mark.parametrize(("name", "sign"), [("uncertainty", -1), ("imtl_l", 1)])
def test_learned_exponents_are_bounded(name, sign):
    # A loss of 0 pushes the exponent further every step.
    limit = log_limit(jnp.dtype("float32"))
    state = make(name, 2).init()._replace(values=jnp.full(2, sign * limit))
    weights, states = run(name, np.zeros((5, 2)), state=state)
    np.testing.assert_allclose(states[-1].values, sign * limit)
    np.testing.assert_allclose(weights, np.exp(limit), rtol=1e-5)


def test_awl_at_zero_is_bounded():
    state = optim.awl(2).init()._replace(values=jnp.array([0.0, -1e-12]))
    weights, states = run("awl", np.array([[1.0, 1.0]]), state=state)
    np.testing.assert_allclose(weights[0], 0.5 / np.finfo(np.float32).eps ** 2)
    # Away from 0, each to its own side.
    np.testing.assert_allclose(states[-1].values, [0.025, -0.025], rtol=1e-5)


def test_stch_far_apart():
    # With mu = 1 and nadir 1 both weights are 2 / (1e-30 + 1e30).
    losses = jnp.array([1e-30, 1e30])
    np.testing.assert_allclose(stch_weights(losses, jnp.ones(2)), 2e-30, rtol=1e-4)
    # Eight times the inverse of the smallest normal number is out of range.
    tiny = jnp.finfo(jnp.float32).tiny
    nadir = jnp.ones(8).at[0].set(tiny)
    weights = stch_weights(jnp.full(8, tiny), nadir)
    np.testing.assert_allclose(weights[0], 1 / tiny, rtol=1e-5)


def test_uw_so_far_apart():
    # The logits are out of range.
    losses = jnp.array([jnp.finfo(jnp.float32).tiny, 1.0])
    weights = uw_so_weights(losses, temperature=1e-3)
    np.testing.assert_array_equal(weights, [1, 0])


def test_dwa_averages_losses_whose_difference_is_out_of_range():
    losses = np.array([[3e38, 1], [-3e38, 1], [3e38, 1], [-3e38, 1], [1, 1]])
    _, states = run("dwa", losses, window=2)
    np.testing.assert_array_equal(states[-1].latest, [0, 1])


def test_dwa_is_neutral_after_a_window_of_zeros():
    latest, previous = jnp.array([3.0, 2.0]), jnp.array([0.0, 2.0])
    np.testing.assert_allclose(dwa_weights(latest, previous), [1, 1], rtol=1e-6)


def test_famo_takes_a_loss_below_its_bound_at_the_bound():
    losses, logits = jnp.array([0.5, 2.0]), jnp.zeros(2)
    below = famo_weights(losses, logits, minimum_losses=(1.0, 1.0))
    at_bound = famo_weights(jnp.array([1.0, 2.0]), logits, minimum_losses=1.0)
    np.testing.assert_array_equal(below, at_bound)
    # D = (1e-8, 1).
    np.testing.assert_allclose(below, [1 - 1e-8, 1e-8], rtol=1e-5)


def test_famo_observes_each_weighing_once():
    balancer = optim.famo(2)
    state = balancer.init()
    untouched = balancer.observe(jnp.ones(2), state, None)
    np.testing.assert_array_equal(untouched.logits.values, 0)
    _, state = balancer.weights(jnp.array([1.0, 3.0]), state, None)
    once = balancer.observe(jnp.ones(2), state, None)
    twice = balancer.observe(jnp.ones(2), once, None)
    assert np.all(np.asarray(once.logits.values) != 0)
    np.testing.assert_array_equal(twice.logits.values, once.logits.values)


def test_famo_sees_small_falls():
    # A fall of 3e-7, five steps of float32, at a loss whose logarithm is 28 and has
    # steps of 2e-6: the difference of two logarithms would be 0.
    losses = np.array([[1e12, 1e12], [1e12 * (1 - 3e-7), 1e12]])
    _, states = run("famo", losses, learning_rate=1.0)
    np.testing.assert_allclose(states[1].logits.values, [-1, 1], rtol=0.2)


def test_gls_of_many_losses_neither_overflows_nor_vanishes():
    # The product of 40 losses of 1e±5 is out of range; each weight is 1/40.
    for scale in (1e-5, 1e5):
        weights = gls_weights(jnp.full(40, scale, jnp.float32))
        np.testing.assert_allclose(weights, 1 / 40, rtol=1e-5)
