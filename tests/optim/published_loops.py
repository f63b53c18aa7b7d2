"""Slow float64 loops of what the papers say, on whole rows, from step to step.

Each is called with the rows of three batches `[3, tasks, params]`, the losses, the
orders in which tasks meet, and the list of active tasks; it sees nothing of the others,
keeps its state in itself and returns the direction.
"""

import functools

import numpy as np
import references


class GradVac:
    def __init__(self, num_tasks):
        self.targets = np.zeros((num_tasks, num_tasks))

    def __call__(self, batches, losses, orders, kept):
        rows, total = batches[0], 0
        for i in kept:
            c = rows[i].copy()
            for j in orders[i]:
                if j == i or j not in kept:
                    continue
                length, other = np.linalg.norm(c), np.linalg.norm(rows[j])
                cosine, t = 0.0, self.targets[i, j]
                if other > 0 and length > 1e-9 * np.linalg.norm(rows[i]):
                    cosine = np.clip(c @ rows[j] / (length * other), -1, 1)
                    if cosine < t:
                        angles = t * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - t**2)
                        c += length * angles / (other * np.sqrt(1 - t**2)) * rows[j]
                self.targets[i, j] = 0.5 * t + 0.5 * cosine
            total = total + c
        return total


class PCD:
    def __init__(self, num_tasks):
        self.averages, self.counts = np.zeros(num_tasks), np.zeros(num_tasks)

    def __call__(self, batches, losses, orders, kept):
        rows = batches[0][kept]
        self.averages[kept] *= 0.999
        self.averages[kept] += 0.001 * np.sum(rows**2, axis=1)
        self.counts[kept] += 1
        if 0 not in kept:
            return np.zeros(rows.shape[1])
        usual = np.sqrt(self.averages[kept] / (1 - 0.999 ** self.counts[kept]))
        return references.pcd(rows, kept.index(0), 0.02, usual)


def nearest_on_simplex(point):
    """By bisection on the number to subtract."""
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        total = np.maximum(point - middle, 0).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return np.maximum(point - low, 0)


class OnSimplex:
    """Keeps a point; active tasks share out what they have together."""

    def __init__(self, move, num_tasks):
        self.move, self.point = move, np.full(num_tasks, 1 / num_tasks)

    def __call__(self, batches, losses, orders, kept):
        first, second, third = batches[:, kept]
        held = self.point[kept].sum()
        equal = np.full(len(kept), 1 / len(kept))
        start = self.point[kept] / held if held > 0 else equal
        point, weights = self.move(second, third, start)
        self.point[kept] = held * point
        return weights @ first


def move_modo(second, third, point):
    slope = second @ (third.T @ point) + 0.1 * point
    point = nearest_on_simplex(point - 0.1 * slope)
    return point, point


def move_sdmgrad(second, third, point):
    scale = np.mean(np.sqrt(np.maximum(np.sum(second * third, axis=1), 0)))
    mean, velocity = np.full(len(point), 1 / len(point)), 0
    for _ in range(20):
        slope = second @ (third.T @ (point + 0.3 * mean)) / scale**2
        velocity = 0.5 * velocity + slope
        point = nearest_on_simplex(point - 0.3 * velocity)
    return point, (point + 0.3 * mean) / 1.3


class GradNorm:
    def __init__(self, num_tasks):
        self.weights, self.first = np.ones(num_tasks), {}

    def __call__(self, batches, losses, orders, kept):
        rows, held = batches[0][kept], self.weights[kept].sum()
        weights = self.weights[kept] * len(kept) / held
        for k in kept:
            self.first.setdefault(k, losses[k])
        rates = np.array([losses[k] / self.first[k] for k in kept])
        lengths = np.linalg.norm(rows, axis=1)
        mean = np.mean(weights * lengths)
        target = mean * (rates / rates.mean()) ** 1.5

        def mismatch(logarithms):
            return np.sum(np.abs(np.exp(logarithms) * lengths - target)) / mean

        logarithms, slope = np.log(weights), np.zeros(len(kept))
        for k, step in enumerate(1e-6 * np.eye(len(kept))):
            rise = mismatch(logarithms + step) - mismatch(logarithms - step)
            slope[k] = np.sign(rise)
        moved = np.exp(logarithms - 0.025 * slope)
        self.weights[kept] = moved * held / moved.sum()
        return weights @ rows


LOOPS = {
    "gradvac": GradVac,
    "pcd": PCD,
    "modo": functools.partial(OnSimplex, move_modo),
    "sdmgrad": functools.partial(OnSimplex, move_sdmgrad),
    "gradnorm": GradNorm,
}
