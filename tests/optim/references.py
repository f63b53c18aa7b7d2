"""Slow float64 directions from the rows themselves, by other means than the package's.

Each takes the task gradients `[tasks, params]` and returns one direction `[params]`.
"""

import itertools

import numpy as np
from scipy.optimize import nnls


def pcgrad(rows, orders):
    """The published loop, on gradients instead of coefficients."""
    total = np.zeros(rows.shape[1])
    for task, order in enumerate(orders):
        gradient = rows[task].copy()
        for other in order:
            overlap = gradient @ rows[other]
            if other != task and overlap < 0:
                gradient -= overlap / (rows[other] @ rows[other]) * rows[other]
        total += gradient
    return total


def mgda(rows):
    """Shortest convex combination: nearest of all affine hulls that contain theirs."""
    num_tasks = len(rows)
    if num_tasks > 8:
        return _least_distance(rows)
    best = None
    for size in range(1, num_tasks + 1):
        for support in itertools.combinations(range(num_tasks), size):
            base, *others = rows[list(support)]
            edges = np.reshape(others, (size - 1, len(base))) - base
            inner = np.linalg.lstsq(edges.T, -base, rcond=None)[0]
            weights = np.array([1 - inner.sum(), *inner])
            if weights.min() >= -1e-9:
                point = base + inner @ edges
                if best is None or point @ point < best @ best:
                    best = point
    return best


def _least_distance(rows):
    """Shortest convex combination as nonnegative least squares."""
    scale = np.linalg.norm(rows, axis=1).min()
    columns = np.vstack([rows.T / scale, np.ones(len(rows))])
    target = np.append(np.zeros(rows.shape[1]), 1.0)
    # Columns of equal length, as nnls stops at an absolute tolerance.
    lengths = np.linalg.norm(columns, axis=0)
    values = nnls(columns / lengths, target)[0] / lengths
    return values @ rows / values.sum()


def upgrad(rows, regularization=0.0):
    """Mean of the projections onto the dual cone, by Moreau: minus those on the cone.

    The ridge is that of extra coordinates, one a task, dropped afterwards.
    """
    num_tasks = len(rows)
    extra = np.sqrt(regularization * np.sum(rows**2)) * np.eye(num_tasks)
    wide = np.hstack([rows, extra])
    lengths = np.linalg.norm(wide, axis=1)
    unit = wide / np.where(lengths > 0, lengths, 1)[:, None]
    total = np.zeros(rows.shape[1])
    for task in range(num_tasks):
        lift = nnls(unit.T, -unit[task], maxiter=1000)[0]
        projected = lengths[task] * (unit[task] + lift @ unit)
        total += projected[: rows.shape[1]]
    return total / num_tasks


def dualproj(rows):
    """The mean plus the nonnegative combination of unit rows that undoes its conflicts.

    By Moreau: the mean minus its projection onto the cone of the negated rows.
    """
    mean = rows.mean(axis=0)
    lengths = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(lengths > 0, lengths, 1)[:, None]
    scale = np.linalg.norm(mean) or 1.0
    return mean + scale * (nnls(unit.T, -mean / scale, maxiter=1000)[0] @ unit)


def conflict_free(rows):
    """Unit pseudo-inverse direction, as long as all projections together."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    direction = np.linalg.pinv(unit) @ np.ones(len(rows))
    direction /= np.linalg.norm(direction)
    return np.sum(rows @ direction) * direction


def imtl_g(rows):
    """Equal projections on unit rows, by weights of sum 1."""
    lengths = np.linalg.norm(rows, axis=1)
    unit = rows / lengths[:, None]
    direction = np.linalg.pinv(unit) @ np.ones(len(rows))
    weights = np.linalg.lstsq(unit.T, direction, rcond=None)[0] / lengths
    return direction / np.sum(weights)


def ntkmtl(rows):
    """All rows stretched to their root mean square length."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.sum(rows / lengths, axis=0) * np.sqrt(np.mean(lengths**2))


def cagrad(rows, c):
    """Best worst case in the ball, by bisection on its level.

    The shortest correction that lifts every task to a level is a least-distance
    problem; its length grows with the level.
    """
    mean = rows.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    inner = rows @ mean
    lengths = np.linalg.norm(rows, axis=1)

    def correction(level):
        # min |x| with rows x >= level − inner: its dual is nonnegative least squares.
        need = (level - inner) / lengths
        scale = np.abs(need).max()
        unit = rows / lengths[:, None]
        columns = np.vstack([unit.T, need / scale])
        target = np.append(np.zeros(rows.shape[1]), 1.0)
        values = nnls(columns, target, maxiter=10000)[0]
        residual = target - columns @ values
        if residual[-1] < 1e-11:
            return None
        return -residual[:-1] / residual[-1] * scale

    low, high = inner.min(), (inner + radius * lengths).min()
    for _ in range(100):
        level = (low + high) / 2
        x = correction(level)
        if x is None or np.linalg.norm(x) > radius:
            high = level
        else:
            low = level
    x = correction(low)
    return mean + (0 if x is None else x)


def pcd(rows, primary=0, tau=0.02, usual=None):
    """Nearest point to the primary gradient that gives every other task its due.

    `usual` are the lengths to divide by, those of the rows by default.
    """
    lengths = np.linalg.norm(rows, axis=1)
    usual = lengths if usual is None else usual
    scaled = rows / np.where(lengths > 0, usual, 1)[:, None]
    chosen = [k for k in range(len(rows)) if k != primary and lengths[k] > 0]
    others, own = scaled[chosen], scaled[primary]
    dues = tau * np.sum(others**2, axis=1)
    find = _nearest_of_flats if len(others) <= 8 else _nearest_in_polyhedron
    point = find(others, dues, own)
    point = own if point is None else point
    length = np.linalg.norm(point)
    return lengths[primary] * point / length if length > 1e-9 else 0 * own


def _nearest_of_flats(others, dues, own):
    """Nearest feasible of the nearest points on all intersections of boundaries."""
    best = None
    for size in range(len(others) + 1):
        for tight in map(list, itertools.combinations(range(len(others)), size)):
            short = dues[tight] - others[tight] @ own
            point = own + np.linalg.lstsq(others[tight], short, rcond=None)[0]
            scale = np.linalg.norm(others, axis=1) * np.linalg.norm(point)
            if np.all(others @ point >= dues - 1e-9 * (dues + scale)):
                distance = np.linalg.norm(point - own)
                if best is None or distance < np.linalg.norm(best - own):
                    best = point
    return best


def _nearest_in_polyhedron(others, dues, own):
    """The same as a least-distance problem, by nonnegative least squares."""
    lengths = np.linalg.norm(others, axis=1)
    need = (dues - others @ own) / lengths
    unit, scale = others / lengths[:, None], np.abs(need).max()
    columns = np.vstack([unit.T, need / scale])
    target = np.append(np.zeros(others.shape[1]), 1.0)
    residual = target - columns @ nnls(columns, target, maxiter=10000)[0]
    if residual[-1] < 1e-11:
        return None
    return own - residual[:-1] / residual[-1] * scale


def fairgrad(rows, alpha):
    """The most useful direction of a ball, by Newton steps on the direction itself.

    It solves `d = sum_k (g_k · d)^(−alpha) g_k`, the top of
    `sum_k (g_k · d)^(1 − alpha) / (1 − alpha) − |d|² / 2`. Tasks whose gradients cancel
    in a positive combination are projected out first.
    """
    lengths = np.linalg.norm(rows, axis=1)
    rows, lengths = rows[lengths > 0], lengths[lengths > 0]
    unit = rows / lengths[:, None]
    held = [nnls(unit.T, -row, maxiter=1000)[1] < 1e-9 for row in unit]
    if np.any(held):
        _, values, basis = np.linalg.svd(unit[held], full_matrices=False)
        basis = basis[values > 1e-9]
        unit = unit - unit @ basis.T @ basis
    free = np.linalg.norm(unit, axis=1) > 1e-9
    if not np.any(free):
        return np.zeros(rows.shape[1])
    longest = lengths.max()
    rows = unit[free] * lengths[free][:, None] / longest
    direction = mgda(unit[free])
    direction /= (rows @ direction).min()

    def utility(direction):
        progress = rows @ direction
        if alpha == 1:
            useful = np.log(progress)
        else:
            useful = progress ** (1 - alpha) / (1 - alpha)
        return useful.sum() - direction @ direction / 2

    for _ in range(2000):
        progress = rows @ direction
        slope = progress**-alpha @ rows - direction
        bends = alpha * progress ** (-alpha - 1)
        step = np.linalg.solve(np.eye(len(slope)) + rows.T * bends @ rows, slope)
        # Short enough that every task keeps some of its progress.
        size = 1 / max(1, 1.5 * np.max(-(rows @ step) / progress))
        least = utility(direction)
        while utility(direction + size * step) < least and size > 1e-3:
            size /= 2
        direction = direction + size * step
        if np.linalg.norm(step) < 1e-13 * np.linalg.norm(direction):
            break
    return direction * longest ** ((1 - alpha) / (1 + alpha))


def aligned_mtl(rows, scale):
    """The singular value decomposition of the rows, with all values made one."""
    lengths = np.linalg.norm(rows, axis=1)
    rank = np.linalg.matrix_rank(rows[lengths > 0] / lengths[lengths > 0][:, None])
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    length = {
        "min": values[-1],
        "median": np.sort(values)[(rank - 1) // 2],
        "rmse": np.sqrt(np.mean(values**2)),
    }[scale]
    return length * left.mean(axis=0) @ right
