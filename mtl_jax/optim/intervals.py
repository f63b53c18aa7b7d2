"""Denoising intervals as tasks: split the noise levels of a diffusion model in groups.

A diffusion model learns to denoise at every one of `T` timesteps. Neighbours agree and
distant ones conflict, so intervals of timesteps make tasks for any multitask method.
`cluster` finds the intervals of least cost, where an interval `[l, r)` costs

    sum over t in [l, r) of distance(c, t),    c = (l + r) // 2,

and the functions `*_costs` know the costs of three distances. All of this is NumPy, to
be run once before training.

References:
    Go et al., Addressing Negative Transfer in Diffusion Models, NeurIPS 2023,
    https://arxiv.org/abs/2306.00354.
"""

import numpy as np
from jaxtyping import Float, Int

Costs = Float[np.ndarray, "num_steps+1 num_steps+1"]


def timestep_costs(num_steps: int) -> Costs:
    """Costs of intervals by the distance of timesteps, `|c - t|`.

    Args:
        num_steps: Number of timesteps, `T`.

    Returns:
        Float64 costs; entry `[l, r]` is that of `[l, r)`, infinite unless `l < r`.

    Raises:
        ValueError: If `num_steps < 1`.
    """
    return _value_costs(np.arange(num_steps, dtype=np.float64))


def log_snr_costs(signal: Float[np.ndarray, " num_steps"]) -> Costs:
    """Costs of intervals by the distance of log signal-to-noise ratios.

    The distance is `|s_c - s_t|` with `s_t = log(signal_t / (1 - signal_t))`. (Without
    the logarithm the first few steps would outweigh all others.)

    Args:
        signal: Share of the signal in the variance at every timestep, strictly between
            0 and 1: the cumulative product of `1 - beta`, usually called alpha-bar.

    Returns:
        Float64 costs; entry `[l, r]` is that of `[l, r)`, infinite unless `l < r`.

    Raises:
        ValueError: If `signal` is not a vector of numbers strictly between 0 and 1.
    """
    signal = np.asarray(signal, np.float64)
    if not np.all((signal > 0) & (signal < 1)):
        raise ValueError(
            "signal has entries outside (0, 1); pass the product of 1 - beta so far."
        )
    return _value_costs(np.log(signal) - np.log1p(-signal))


def gradient_costs(affinity: Float[np.ndarray, "num_steps num_steps"]) -> Costs:
    """Costs of intervals by how little the gradients of timesteps agree, `-A[c, t]`.

    Args:
        affinity: `A[i, j]`, the cosine between gradients of the losses at timesteps `i`
            and `j`, averaged over checkpoints of a training run.

    Returns:
        Float64 costs; entry `[l, r]` is that of `[l, r)`, infinite unless `l < r`.

    Raises:
        ValueError: If `affinity` is not a square matrix of finite numbers.
    """
    return _interval_costs(-np.asarray(affinity, np.float64))


def cluster(costs: Costs, num_intervals: int) -> Int[np.ndarray, " num_intervals+1"]:
    """Split timesteps into contiguous intervals of least total cost.

    Exact, by dynamic programming: the best split of `[0, r)` into `i` intervals is the
    best split of some `[0, m)` into `i - 1`, and `[m, r)`. Among equal splits the one
    whose last interval is longest wins, then that whose last but one is, and so on.
    Cost: `num_intervals * T²` operations.

    Args:
        costs: Entry `[l, r]` is the cost of the interval `[l, r)`; those with `l >= r`
            are not looked at.
        num_intervals: Number of intervals, each of one timestep or more.

    Returns:
        Boundaries `0 = b_0 < b_1 < ... < b_k = T`; interval `i` is `[b_i, b_{i+1})`.

    Raises:
        ValueError: If `costs` is not a square matrix, or there are fewer timesteps than
            intervals or no interval.
    """
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1]:
        raise ValueError(f"costs has shape {costs.shape}; pass a square matrix.")
    num_steps = len(costs) - 1
    if not 1 <= num_intervals <= num_steps:
        raise ValueError(
            f"num_intervals is {num_intervals}; pass 1 to {num_steps}, the timesteps."
        )
    usable = np.where(_is_interval(num_steps), costs, np.inf)
    least, starts = usable[0], []
    for _ in range(num_intervals - 1):
        totals = least[:, None] + usable
        starts.append(np.argmin(totals, axis=0))
        least = np.min(totals, axis=0)

    boundaries = [num_steps]
    for start in reversed(starts):
        boundaries.append(int(start[boundaries[-1]]))
    return np.array([*boundaries, 0][::-1])


def _value_costs(values: Float[np.ndarray, " num_steps"]) -> Costs:
    if values.ndim != 1:
        raise ValueError(f"values has shape {values.shape}; pass one a timestep.")
    return _interval_costs(np.abs(values[:, None] - values[None, :]))


def _interval_costs(distances: Float[np.ndarray, "num_steps num_steps"]) -> Costs:
    """Sum each row over every interval of which its timestep is the centre."""
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"got an array {distances.shape}; pass a square matrix.")
    num_steps = len(distances)
    if num_steps < 1 or not np.all(np.isfinite(distances)):
        raise ValueError("pass finite numbers, for one timestep or more.")
    sums = np.pad(np.cumsum(distances, axis=1), ((0, 0), (1, 0)))
    left, right = np.indices((num_steps + 1, num_steps + 1))
    centre = np.minimum((left + right) // 2, num_steps - 1)
    costs = sums[centre, right] - sums[centre, left]
    return np.where(_is_interval(num_steps), costs, np.inf)


def _is_interval(num_steps: int) -> np.ndarray:
    return np.triu(np.ones((num_steps + 1, num_steps + 1), bool), k=1)
