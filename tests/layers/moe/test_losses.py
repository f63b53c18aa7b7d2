import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.layers.moe import losses


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        # Importance (1, 1): no variation.
        ([[0.75, 0.25], [0.25, 0.75]], 0.0),
        # Importance (1.5, 0.5): mean 1, variance 1/4.
        ([[0.75, 0.25], [0.75, 0.25]], 0.25),
        # Importance (2, 0, 0, 0): mean 1/2, variance 3/4.
        ([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], 3.0),
        ([[0.25, 0.25, 0.25, 0.25]], 0.0),
        ([[0.0, 0.0]], 0.0),
    ],
)
def test_importance_by_hand(probabilities, expected):
    loss = losses.importance_loss(jnp.array(probabilities))
    np.testing.assert_allclose(loss, expected, atol=1e-7)


def test_importance_is_taken_group_by_group():
    first, second = [[0.75, 0.25]], [[0.25, 0.75]]
    loss = losses.importance_loss(jnp.array([first, second]))
    np.testing.assert_allclose(loss, [0.25, 0.25], atol=1e-7)


def chance(standard_deviations):
    """1 - Φ."""
    return 0.5 * math.erfc(standard_deviations / math.sqrt(2))


def test_load_by_hand():
    # Logits (1, 0) and threshold 1, noise of deviation 1/2: the experts need 0 and 2
    # deviations. The other token needs 1 and 3.
    logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    threshold = jnp.array([1.0, 1.5])
    first = (chance(0) + chance(1)) / 2
    second = (chance(2) + chance(3)) / 2
    expected = ((first - second) / (first + second)) ** 2
    loss = losses.load_loss(logits, threshold, 0.5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_load_of_equal_logits_is_zero():
    logits = jnp.full((3, 5, 4), 0.3)
    loss = losses.load_loss(logits, jnp.full((3, 5), 0.9), 0.25)
    np.testing.assert_allclose(loss, np.zeros(3), atol=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        # Two of three tokens go to expert 0: f = (2, 1)/3, P = (1.9, 1.1)/3.
        ([[0.7, 0.3], [0.4, 0.6], [0.8, 0.2]], 2 * (2 * 1.9 + 1.1) / 9),
        # Either of f and P uniform.
        ([[0.9, 0.1], [0.4, 0.6]], 1.0),
        ([[0.5, 0.5], [0.5, 0.5]], 1.0),
        # One expert has everything.
        ([[0.0, 1.0, 0.0, 0.0]] * 5, 4.0),
        # That 1 is the least is a common belief: f = (1, 2)/3, P = (0.66, 0.34).
        ([[1.0, 0.0], [0.49, 0.51], [0.49, 0.51]], 2 * (0.66 + 2 * 0.34) / 3),
    ],
)
def test_switch_loss_by_hand(probabilities, expected):
    probabilities = jnp.array([probabilities])
    first = jnp.argmax(probabilities, axis=-1)[..., None]
    loss = losses.switch_loss(probabilities, first)
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)
    np.testing.assert_array_equal(losses.gshard_loss(probabilities), loss)


def test_switch_loss_counts_all_choices_and_gshard_loss_the_first():
    probabilities = jnp.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])
    # Assignments: 0, 1 and 0, 2. f = (2, 1, 1)/4, P = (1.1, 0.4, 0.5)/2.
    loss = losses.switch_loss(probabilities, jnp.array([[0, 1], [0, 2]]))
    np.testing.assert_allclose(loss, 3 * (2 * 1.1 + 0.4 + 0.5) / 8, rtol=1e-6)
    np.testing.assert_allclose(losses.gshard_loss(probabilities), 3 * 0.55, rtol=1e-6)


def test_z_loss_by_hand():
    # Denominators 3 + 1 and 1 + 1.
    logits = jnp.array([[[math.log(3), 0.0], [0.0, 0.0]]])
    expected = (math.log(4) ** 2 + math.log(2) ** 2) / 2
    np.testing.assert_allclose(losses.z_loss(logits), [expected], rtol=1e-6)


def mutual_information_of_tokens(gates_of_task):
    """In float64, over the (token, task) pairs themselves."""
    total = sum(len(gates) for gates in gates_of_task)
    joint = np.stack([gates.sum(0) for gates in gates_of_task]) / total
    by_task = joint.sum(1) + 1e-4
    by_expert = joint.sum(0) + 1e-4
    ratio = joint / by_task[:, None] / by_expert[None]
    return -(joint * np.log(ratio + 1e-4)).sum()


def test_mutual_information_weighs_tasks_by_their_tokens():
    rng = np.random.default_rng(0)
    tokens = [rng.dirichlet(np.full(5, 0.3), size=size) for size in (7, 2, 4)]
    gates = jnp.float32([gates.mean(0) for gates in tokens])
    loss = losses.mutual_information(gates, jnp.array([7.0, 2.0, 4.0]))
    expected = mutual_information_of_tokens(tokens)
    assert expected < -0.1
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    equal = [gates.mean(0, keepdims=True) for gates in tokens]
    np.testing.assert_allclose(
        losses.mutual_information(gates),
        mutual_information_of_tokens(equal),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        (np.full((3, 6), 1 / 6), 0.0),
        # Tasks may prefer experts, as long as they prefer the same.
        (np.tile([0.7, 0.2, 0.1], (4, 1)), 0.0),
        # One task, one expert.
        (np.eye(4), -math.log(4)),
        # Two experts a task.
        (np.kron(np.eye(3), [[0.5, 0.5]]), -math.log(3)),
        (np.ones((1, 1)), 0.0),
    ],
)
def test_mutual_information_of_extremes(gates, expected):
    # Up to the released code's epsilon of 1e-4.
    loss = losses.mutual_information(jnp.float32(gates))
    np.testing.assert_allclose(loss, expected, atol=2e-3)


def test_tasks_without_tokens_do_not_count():
    gates = jnp.array([[0.8, 0.2], [0.3, 0.7], [math.nan, 0.5]])
    tokens = jnp.array([3.0, 5.0, 0.0])
    step = jax.jit(jax.value_and_grad(losses.mutual_information))
    value, gradient = step(gates, tokens)
    expected, _ = step(gates[:2], tokens[:2])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[2], [0.0, 0.0])
    assert step(gates, jnp.zeros(3))[0] == 0.0


def test_gradient_of_mutual_information_by_finite_differences():
    rng = np.random.default_rng(1)
    gates = rng.dirichlet(np.ones(4), size=3)
    direction = rng.normal(size=gates.shape)

    def value(gates):
        copies = [np.tile(row, (n, 1)) for row, n in zip(gates, (3, 1, 2), strict=True)]
        return mutual_information_of_tokens(copies)

    step = 1e-5 * direction
    difference = (value(gates + step) - value(gates - step)) / 2e-5
    gradient = jax.jit(jax.grad(losses.mutual_information))(
        jnp.float32(gates), jnp.array([3.0, 1.0, 2.0])
    )
    np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-4)
