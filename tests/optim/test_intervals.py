"""Interval clustering: known boundaries, brute force, and what costs mean."""

import itertools

import numpy as np
import pytest

from mtl_jax.optim import intervals

STEPS = 1000
# Ho et al., Denoising Diffusion Probabilistic Models, 2020: beta from 1e-4 to 0.02.
LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, STEPS))


def cosine_signal():
    """Nichol and Dhariwal, 2021: alpha-bar as a cosine, offset 0.008, beta ≤ 0.999."""
    grid = np.arange(STEPS + 1) / STEPS
    signal = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - signal[1:] / signal[:-1], 0.999))


def test_timestep_boundaries():
    # An interval of n steps costs n²/4, rounded down, so that 199 + 201 steps cost as
    # much as 200 + 200: of the equal splits the one of the longest last intervals.
    boundaries = intervals.cluster(intervals.timestep_costs(STEPS), 5)
    assert boundaries.tolist() == [0, 199, 398, 598, 799, 1000]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0, 153, 394, 624, 823, 1000]),
        ("linear", [0, 67, 188, 341, 496, 639, 768, 887, 1000]),
        ("cosine", [0, 133, 372, 653, 881, 1000]),
        ("cosine", [0, 63, 178, 335, 518, 697, 846, 949, 1000]),
    ],
)
def test_log_snr_boundaries(schedule, expected):
    signal = LINEAR if schedule == "linear" else cosine_signal()
    costs = intervals.log_snr_costs(signal)
    assert intervals.cluster(costs, len(expected) - 1).tolist() == expected


def slow_cost(distances, left, right):
    centre = (left + right) // 2
    return sum(distances[centre, t] for t in range(left, right))


def signal_and_distances(num_steps, seed):
    signal = np.random.default_rng(seed).uniform(0.01, 0.99, num_steps)
    log_snr = np.log(signal / (1 - signal))
    return signal, np.abs(log_snr[:, None] - log_snr[None, :])


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_costs_are_sums_of_distances_to_the_centre(num_steps):
    rng = np.random.default_rng(num_steps)
    affinity = rng.uniform(-1, 1, (num_steps, num_steps))
    signal, distances = signal_and_distances(num_steps, 0)
    steps = np.arange(num_steps)
    for costs, expected in (
        (intervals.timestep_costs(num_steps), np.abs(steps[:, None] - steps)),
        (intervals.log_snr_costs(signal), distances),
        (intervals.gradient_costs(affinity), -affinity),
    ):
        assert costs.shape == (num_steps + 1, num_steps + 1)
        for left, right in np.ndindex(costs.shape):
            if left < right:
                np.testing.assert_allclose(
                    costs[left, right], slow_cost(expected, left, right), atol=1e-12
                )
            else:
                assert costs[left, right] == np.inf


def test_costs_of_long_schedules_are_right():
    costs = intervals.log_snr_costs(LINEAR)
    log_snr = np.log(LINEAR / (1 - LINEAR))
    for left, right in ((0, 1000), (17, 18), (0, 153), (823, 1000)):
        centre = (left + right) // 2
        expected = np.sum(np.abs(log_snr[left:right] - log_snr[centre]))
        np.testing.assert_allclose(costs[left, right], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_intervals", [1, 2, 3, 4])
@pytest.mark.parametrize("num_steps", [4, 9, 14])
def test_brute_force(num_steps, num_intervals):
    for seed in range(3):
        # Values in no order and gradients of any sign: nothing monotone to lean on.
        affinity = np.random.default_rng(seed).uniform(-1, 1, (num_steps, num_steps))
        signal, distances = signal_and_distances(num_steps, seed)
        for costs, slow in (
            (intervals.log_snr_costs(signal), distances),
            (intervals.gradient_costs(affinity), -affinity),
        ):
            inner = itertools.combinations(range(1, num_steps), num_intervals - 1)
            best = min(
                ((0, *cuts, num_steps) for cuts in inner),
                key=lambda bounds: sum(
                    slow_cost(slow, *pair) for pair in itertools.pairwise(bounds)
                ),
            )
            assert tuple(intervals.cluster(costs, num_intervals)) == best


def test_own_costs_and_extreme_numbers_of_intervals():
    costs = intervals.timestep_costs(6)
    assert intervals.cluster(costs, 1).tolist() == [0, 6]
    assert intervals.cluster(costs, 6).tolist() == list(range(7))
    # Any matrix will do, and what is below the diagonal does not count.
    own = np.full((4, 4), -100.0)
    own[np.triu_indices(4, 1)] = [7, 1, 9, 5, 1, 5]
    assert intervals.cluster(own, 2).tolist() == [0, 2, 3]


def test_mistakes_are_explained():
    costs = intervals.timestep_costs(3)
    for num_intervals in (0, 4):
        with pytest.raises(ValueError, match=f"num_intervals is {num_intervals}"):
            intervals.cluster(costs, num_intervals)
    with pytest.raises(ValueError, match="square"):
        intervals.cluster(costs[1:], 2)
    with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
        intervals.log_snr_costs(np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="one a timestep"):
        intervals.log_snr_costs(np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="square"):
        intervals.gradient_costs(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="finite"):
        intervals.gradient_costs(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="one timestep or more"):
        intervals.timestep_costs(0)
