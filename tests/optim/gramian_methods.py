"""The table of Gramian methods that test_methods.py holds to one set of properties.

A new method needs one entry here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import references

from mtl_jax import optim
from mtl_jax.optim.aligned_mtl import weights as aligned_mtl_weights
from mtl_jax.optim.cagrad import weights as cagrad_weights
from mtl_jax.optim.conflict_free import weights as conflict_free_weights
from mtl_jax.optim.dualproj import weights as dualproj_weights
from mtl_jax.optim.fairgrad import weights as fairgrad_weights
from mtl_jax.optim.gradvac import weights as gradvac_weights
from mtl_jax.optim.imtl_g import weights as imtl_g_weights
from mtl_jax.optim.mean import weights as mean_weights
from mtl_jax.optim.mgda import weights as mgda_weights
from mtl_jax.optim.nash_mtl import weights as nash_mtl_weights
from mtl_jax.optim.ntkmtl import weights as ntkmtl_weights
from mtl_jax.optim.pcd import PCDMemory
from mtl_jax.optim.pcd import weights as pcd_weights
from mtl_jax.optim.pcgrad import weights as pcgrad_weights
from mtl_jax.optim.sum import weights as sum_weights
from mtl_jax.optim.upgrad import weights as upgrad_weights


class Outcomes(NamedTuple):
    """Directions where gradients are degenerate, `|g| = 5`, `h` orthogonal, `|h| = 2`.

    Multiples of `g`, and of `(g, h)` for `beside`.
    """

    all_zero: float  # [0, 0]
    one_zero: float  # [g, 0]
    duplicates: float  # [g, g]
    opposite: float  # [g, -g]
    unequal: float  # [g, -3g]
    beside: tuple[float, float]  # [g, -g, h]
    single: float  # [g]


class Input(NamedTuple):
    """What a method is given beside the Gramian, such as random orders."""

    make: Callable[[int], Any]  # num_tasks -> value
    from_key: Callable[[Any, int], Any]  # what the aggregator draws, given its key
    permute: Callable[[Any, Any], Any]  # once task permutation[i] has become task i
    keep: Callable[[Any, Any], Any]  # for the active tasks alone


class Method(NamedTuple):
    """One entry: how to call a method and what to hold it to.

    Attributes:
        make: num_tasks -> aggregator.
        weights: (gramian, active, *inputs) -> weights. A stateful method is called with
            the memory of its first step.
        reference: (rows, *inputs) -> direction, in float64.
        outcomes: What degenerate gradients give; those of the reference if None.
        worked: Pair of gradients in `PAIRS` -> (weights, direction), None if unknown.
        power: `p` in `A(s J) = s**p A(J)`.
        inputs: What `weights` and `reference` take beside, for random methods.
        equivariant: Whether renaming the tasks renames the weights.
        never_conflicts: Whether `d · g_k >= 0` for any gradients.
        guarantee: (rows, weights, direction) -> numbers of order one, each nonnegative,
            for independent rows.
        tolerance: Relative error of the direction in float32.
    """

    make: Callable[[int], optim.Aggregator]
    weights: Callable[..., Any]
    reference: Callable[..., Any]
    outcomes: Outcomes | None
    worked: dict[str, tuple[Any, Any]]
    power: float = 1.0
    inputs: Input | None = None
    equivariant: bool = True
    never_conflicts: bool = False
    guarantee: Callable[[Any, Any, Any], Any] | None = None
    tolerance: float = 1e-4


def make_orders(num_tasks):
    rng = np.random.default_rng(num_tasks)
    return np.array([rng.permutation(num_tasks) for _ in range(num_tasks)])


def kept_orders(orders, active):
    kept = np.flatnonzero(active)
    return np.array(
        [[np.searchsorted(kept, j) for j in orders[i] if active[j]] for i in kept]
    )


# Row i is the order in which task i visits the others.
ORDERS = Input(
    make=make_orders,
    from_key=lambda key, num_tasks: jnp.argsort(
        jax.random.uniform(key, (num_tasks, num_tasks)), axis=-1
    ),
    permute=lambda orders, permutation: np.argsort(permutation)[orders[permutation]],
    keep=kept_orders,
)


def low_index(num_tasks):
    return np.array(3 if num_tasks > 3 else 0)


# The task to follow, one that is active wherever the tests choose.
PRIMARY = Input(
    make=low_index,
    from_key=lambda key, num_tasks: low_index(num_tasks),
    permute=lambda primary, permutation: np.argsort(permutation)[primary],
    keep=lambda primary, active: np.sum(active[:primary]),
)


def first_gradvac_weights(gramian, active, orders):
    return gradvac_weights(gramian, orders, jnp.zeros_like(gramian), active)[0]


def first_pcd_weights(gramian, active, primary):
    zeros = jnp.zeros_like(jnp.diagonal(gramian))
    memory = PCDMemory(zeros, zeros)
    return pcd_weights(gramian, memory, active, primary=primary)[0]


def gives_every_task_its_due(rows, weights, direction):
    # The weight of the primary task tells by what the direction was divided.
    lengths, primary = np.linalg.norm(rows, axis=1), low_index(len(rows))
    progress = rows @ direction / lengths / lengths[primary] / weights[primary]
    return np.delete(progress, primary) - 0.02


def cosines_with(rows, direction):
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(direction)
    return rows @ direction / lengths


def no_conflict(rows, weights, direction):
    return cosines_with(rows, direction)


def improves_all_by_its_square(rows, weights, direction):
    lengths = np.linalg.norm(rows, axis=1)
    return cosines_with(rows, direction) - np.linalg.norm(direction) / lengths


def projects_equally(rows, weights, direction):
    return [-np.ptp(cosines_with(rows, direction)), -abs(weights.sum() - 1)]


def shares_a_fixed_length(rows, weights, direction):
    relative = np.linalg.norm(direction) / np.sqrt(len(rows))
    return [-abs(relative - 1), *cosines_with(rows, direction)]


def aligned(scale, beside, **worked):
    """Any scale gives the same where there is one principal direction.

    Of `[g, -3g]` that is `(1, -3) / sqrt(10)`, of length `sqrt(10) |g|`, and the mean
    preference is -1 / sqrt(10) of it.
    """
    return Method(
        make=functools.partial(optim.aligned_mtl, scale=scale),
        weights=functools.partial(aligned_mtl_weights, scale=scale),
        reference=lambda rows: references.aligned_mtl(rows, scale),
        outcomes=Outcomes(0, 0.5, 1, 0, -1, (0, beside), 1),
        worked=worked,
    )


def fair_outcomes(alpha):
    """Of one equation: `w_k = (g_k · d)^(−alpha)`, with `d` along all `g_k` alike."""

    def weight(squared_length):
        return squared_length ** (-alpha / (1 + alpha))

    one = weight(25)
    return Outcomes(0, one, 2 * weight(2 * 25), 0, 0, (0, weight(4)), one)


def best_within_ball(rows, weights, direction):
    mean = rows.mean(axis=0)
    distance = np.linalg.norm(direction - mean) / np.linalg.norm(mean)
    gain = (rows @ direction).min() - (rows @ mean).min()
    return [-abs(distance - 0.4), gain / np.linalg.norm(mean)]


# Worked by hand or checked against it in the project's method notes: the first pair has
# G = [[18, -22], [-22, 38]], the second [[1, -1], [-1, 2]].
PAIRS = {
    "slanted": np.array([[-4.0, 1, 1], [6, 1, 1]]),
    "plane": np.array([[1.0, 0], [-1, 1]]),
}

METHODS = {
    "sum": Method(
        make=optim.sum,
        weights=sum_weights,
        reference=lambda rows: rows.sum(axis=0),
        outcomes=Outcomes(0, 1, 2, 0, -2, (0, 1), 1),
        worked={"slanted": ((1, 1), (2, 2, 2)), "plane": ((1, 1), (0, 1))},
    ),
    # 1 + 22/18 and 1 + 22/38. Opposite rows project to zero and leave h alone.
    "pcgrad": Method(
        make=optim.pcgrad,
        weights=lambda gramian, active, orders: pcgrad_weights(gramian, orders, active),
        reference=references.pcgrad,
        outcomes=Outcomes(0, 1, 2, 0, 0, (0, 1), 1),
        worked={
            "slanted": ((2.222222, 1.578947), (0.584795, 3.801170, 3.801170)),
            "plane": ((2, 1.5), (0.5, 1.5)),
        },
        inputs=ORDERS,
    ),
    # w_1 = (38 + 22) / (18 + 38 + 44). Vanishes where zero is in the hull.
    "mgda": Method(
        make=optim.mgda,
        weights=mgda_weights,
        reference=references.mgda,
        outcomes=Outcomes(0, 0, 1, 0, 0, (0, 0), 1),
        worked={
            "slanted": ((0.6, 0.4), (0, 1, 1)),
            "plane": ((0.6, 0.4), (0.2, 0.4)),
        },
        never_conflicts=True,
        guarantee=improves_all_by_its_square,
    ),
    # The mean of [g, -3g] is -g, and the best worst case in the ball of radius 0.4 |g|
    # is -0.6 g; beside a zero row, or with h beside opposite rows, the mean hurts
    # nobody and nothing can improve the worst case, 0.
    "cagrad": Method(
        make=optim.cagrad,
        weights=cagrad_weights,
        reference=lambda rows: references.cagrad(rows, 0.4),
        outcomes=Outcomes(0, 0.5, 1.4, 0, -0.6, (0, 1 / 3), 1.4),
        worked={
            "slanted": ((0.663299, 0.5), (0.346803, 1.163299, 1.163299)),
            "plane": ((0.7, 0.5), (0.2, 0.5)),
        },
        guarantee=best_within_ball,
    ),
    # Half of PCGrad's.
    "upgrad": Method(
        make=optim.upgrad,
        weights=upgrad_weights,
        reference=references.upgrad,
        outcomes=Outcomes(0, 0.5, 1, 0, 0, (0, 1 / 3), 1),
        worked={
            "slanted": ((1.111111, 0.789474), (0.292398, 1.900585, 1.900585)),
            "plane": ((1, 0.75), (0.25, 0.75)),
        },
        never_conflicts=True,
        guarantee=no_conflict,
    ),
    "mean": Method(
        make=optim.mean,
        weights=mean_weights,
        reference=lambda rows: rows.mean(axis=0),
        outcomes=Outcomes(0, 0.5, 1, 0, -1, (0, 1 / 3), 1),
        worked={"slanted": ((0.5, 0.5), (1, 1, 1)), "plane": ((0.5, 0.5), (0, 0.5))},
    ),
    # sqrt(28 / 18) and sqrt(28 / 38); sqrt(1.5 / 1) and sqrt(1.5 / 2). With |g| = 5 and
    # |h| = 2 the root mean square of [g, -g, h] is sqrt(18), and h grows to that.
    "ntkmtl": Method(
        make=optim.ntkmtl,
        weights=ntkmtl_weights,
        reference=references.ntkmtl,
        outcomes=Outcomes(0, np.sqrt(0.5), 2, 0, 0, (0, np.sqrt(4.5)), 1),
        worked={
            "slanted": ((1.247219, 0.858395), (0.161493, 2.105614, 2.105614)),
            "plane": ((1.224745, 0.866025), (0.358719, 0.866025)),
        },
    ),
    # The mean is lifted by 22 - 18 over 2 · 18 of the first gradient.
    "dualproj": Method(
        make=optim.dualproj,
        weights=dualproj_weights,
        reference=references.dualproj,
        outcomes=Outcomes(0, 0.5, 1, 0, 0, (0, 1 / 3), 1),
        worked={
            "slanted": ((0.611111, 0.5), (0.555556, 1.111111, 1.111111)),
            "plane": ((0.5, 0.5), (0, 0.5)),
        },
        never_conflicts=True,
        guarantee=no_conflict,
    ),
    # Opposite gradients have no direction of equal angles, h has its own.
    "conflict_free": Method(
        make=optim.conflict_free,
        weights=conflict_free_weights,
        reference=references.conflict_free,
        outcomes=Outcomes(0, 1, 2, 0, 0, (0, 1), 1),
        worked={
            "slanted": (
                (1.226483, 0.844124),
                (0.158809, 2.070607, 2.070607),
            ),
            "plane": ((1.207107, 0.853553), (0.353553, 0.853553)),
        },
        guarantee=no_conflict,
    ),
    "imtl_g": Method(
        make=optim.imtl_g,
        weights=imtl_g_weights,
        reference=references.imtl_g,
        outcomes=Outcomes(0, 1, 1, 0, 0, (0, 1), 1),
        worked={
            "slanted": ((0.592330, 0.407670), (0.076697, 1, 1)),
            "plane": ((0.585786, 0.414214), (0.171573, 0.414214)),
        },
        guarantee=projects_equally,
    ),
    # [g, -g, h] has singular values sqrt(50) and 2, the length that h gets over 3.
    "aligned_mtl": aligned(
        "min",
        1 / 3,
        slanted=((0.559072, 0.408261), (0.213279, 0.967333, 0.967333)),
        plane=((0.552786, 0.414590), (0.138197, 0.414590)),
    ),
    "aligned_mtl, median": aligned(
        "median",
        1 / 3,
        slanted=((0.559072, 0.408261), (0.213279, 0.967333, 0.967333)),
    ),
    "aligned_mtl, rmse": aligned(
        "rmse",
        np.sqrt(27) / 6,
        slanted=((1.510866, 1.103306), (0.576376, 2.614172, 2.614172)),
    ),
    # The progress of a task that makes up all of d is |g|² w. Opposite gradients leave
    # nothing to bargain for, h has its own.
    "nash_mtl": Method(
        make=optim.nash_mtl,
        weights=nash_mtl_weights,
        reference=lambda rows: references.fairgrad(rows, 1),
        outcomes=fair_outcomes(1),
        worked={
            "slanted": ((0.591461, 0.407071), (0.076584, 0.998533, 0.998533)),
            "plane": ((1.847759, 1.306563), (0.541196, 1.306563)),
        },
        power=0,
        never_conflicts=True,
        guarantee=shares_a_fixed_length,
    ),
    "fairgrad": Method(
        make=optim.fairgrad,
        weights=fairgrad_weights,
        reference=lambda rows: references.fairgrad(rows, 2),
        outcomes=fair_outcomes(2),
        worked={
            "slanted": ((0.471363, 0.319454), (0.031274, 0.790817, 0.790817)),
            "plane": ((2.174053, 1.495842), None),
        },
        power=-1 / 3,
        never_conflicts=True,
        guarantee=no_conflict,
    ),
    "fairgrad, alpha 0.5": Method(
        make=functools.partial(optim.fairgrad, alpha=0.5),
        weights=functools.partial(fairgrad_weights, alpha=0.5),
        reference=lambda rows: references.fairgrad(rows, 0.5),
        outcomes=fair_outcomes(0.5),
        worked={"slanted": ((0.742828, 0.525393), (0.181043, 1.268221, 1.268221))},
        power=1 / 3,
        never_conflicts=True,
        guarantee=no_conflict,
    ),
    # The first step of GradVac is PCGrad.
    "gradvac": Method(
        make=optim.gradvac,
        weights=first_gradvac_weights,
        reference=references.pcgrad,
        outcomes=Outcomes(0, 1, 2, 0, 0, (0, 1), 1),
        worked={
            "slanted": ((2.222222, 1.578947), (0.584795, 3.801170, 3.801170)),
            "plane": ((2, 1.5), (0.5, 1.5)),
        },
        inputs=ORDERS,
    ),
    # With unit rows u, v and u · v = c < 0: d̂ = u + y v, y = 0.02 − c, of length
    # l² = 1 + 2cy + y², and weights 1 / l and y |g_1| / (l |g_2|). For v = −u that is
    # −0.02 u, scaled to the length of g; h adds as much at right angles.
    "pcd": Method(
        make=lambda num_tasks: optim.pcd(num_tasks, primary=int(low_index(num_tasks))),
        weights=first_pcd_weights,
        reference=references.pcd,
        outcomes=Outcomes(0, 1, 1, -1, -1, (-np.sqrt(0.5), np.sqrt(3.125)), 1),
        worked={
            "slanted": ((1.848061, 1.095368), (-0.820033, 2.943429, 2.943429)),
            "plane": ((1.413648, 0.726816), (0.686832, 0.726816)),
        },
        inputs=PRIMARY,
        guarantee=gives_every_task_its_due,
    ),
}
