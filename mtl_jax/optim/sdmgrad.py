"""SDMGrad: the min-norm combination near the mean, from independent batches."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, all_active
from mtl_jax.optim.nonnegative import precise_matmul
from mtl_jax.optim.simplex import from_cross_gramian, project_simplex, restrict


def weights(
    cross_gramian: Float[Array, "tasks tasks"],
    previous: Float[Array, " tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    regularization: float = 0.3,
    learning_rate: float = 0.3,
    momentum: float = 0.5,
    num_iterations: int = 20,
) -> tuple[Float[Array, " tasks"], Float[Array, " tasks"]]:
    """A fixed number of projected steps towards the min-norm weights, then averaged.

    Args:
        cross_gramian: Inner products of the task gradients of two independent batches.
        previous: The point on the simplex to go on from, equal parts at first.
        active: Which tasks are present; all by default.
        regularization: Strength of the pull towards the mean gradient.
        learning_rate: Size of the steps, for gradients of length one.
        momentum: Share of the previous step that is added to the next.
        num_iterations: Number of steps.

    Returns:
        `(weights, point)` of the matrix's dtype: weights that sum to 1 over the active
        tasks, 0 for the others; and the point to go on from, in which the active tasks
        hold as much together as before and the others what they had.
    """
    active = all_active(len(previous)) if active is None else active
    start, share = restrict(previous, active)
    equal, _ = restrict(jnp.ones_like(previous), active)
    both = active[:, None] & active[None, :]
    matrix = jnp.where(both, cross_gramian, 0)
    scale = jnp.sum(equal * jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0)))
    # Without one task whose batches agree there is no scale, and nothing to trust.
    trusted = scale > 0
    scale = jnp.where(trusted, scale, 1)
    # Two divisions, as the square of a small scale could underflow.
    matrix = jnp.where(trusted, matrix / scale / scale, 0)

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        point, velocity = carry
        slope = precise_matmul(matrix, point + regularization * equal)
        velocity = momentum * velocity + slope
        return project_simplex(point - learning_rate * velocity, active), velocity

    point, _ = jax.lax.fori_loop(
        0, num_iterations, step, (start, jnp.zeros_like(start))
    )
    values = (point + regularization * equal) / (1 + regularization)
    return values, jnp.where(active, share * point, previous)


def sdmgrad(
    num_tasks: int,
    *,
    regularization: float = 0.3,
    learning_rate: float = 0.3,
    momentum: float = 0.5,
    num_iterations: int = 20,
) -> Aggregator:
    """Step along the min-norm combination of gradients drawn towards their mean.

    Stochastic direction-oriented multi-objective gradient descent. With `ρ` the
    regularization, `ḡ` the mean gradient and `w` on the simplex minimising
    `|sum_k w_k g_k + ρ ḡ|²`, the direction is `d = (sum_k w_k g_k + ρ ḡ) / (1 + ρ)`:
    that of MGDA for `ρ = 0`, the mean as `ρ` grows. The slope of the objective is
    estimated without bias as `A (w + ρ/K)`, `A = J₂ J₃ᵀ` from the gradients of two
    further batches, and `w` takes `num_iterations` steps of projected gradient descent
    with momentum, starting where the last batch left it. `A` is divided by
    `(mean_k sqrt(max(A_kk, 0)))²`, so that `w` does not depend on the gradients' scale.

    The steps settle if the learning rate times the largest eigenvalue of the scaled `A`
    is below `2 (1 + momentum)`. For gradients of one length that eigenvalue is at most
    the number of tasks, so that the default suits ten. The authors' rate is 10: there
    `w` jumps between corners of the simplex unless the gradients are almost parallel,
    its last digits decide where it ends, and the objective stays far above its minimum.

    Zero gradients everywhere leave the weights as they were, and so do batches that
    agree on no task (no `A_kk > 0`). A single zero gradient takes most of the weight,
    as does the shorter of two opposite ones, but every task keeps `ρ / K / (1 + ρ)`;
    duplicates keep equal weights. An inactive task keeps its part of `w`, while those
    active divide up what they have together; in `d` that is scaled to sum to 1. Cost:
    the gradients of three batches, `tasks²` numbers reduced, then `num_iterations`
    products of that size; the state keeps one number a task.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        regularization: Strength of the pull towards the mean gradient, `λ` in the
            paper.
        learning_rate: Size of the inner steps.
        momentum: Share of the previous inner step that is added to the next, in [0, 1).
        num_iterations: Number of inner steps.

    Returns:
        An aggregator whose `update` needs `second` and `third`; see
        `from_cross_gramian`.

    Raises:
        ValueError: If `num_tasks < 1`, `regularization < 0`, `learning_rate < 0`,
            `momentum` is not in [0, 1) or `num_iterations` not 1 to 1,000,000, or,
            from `update`, if a batch is missing.

    References:
        Xiao et al., Direction-oriented Multi-objective Learning: Simple and Provable
        Stochastic Algorithms, NeurIPS 2023, https://arxiv.org/abs/2305.18409.
    """
    for name, value in (
        ("regularization", regularization),
        ("learning_rate", learning_rate),
    ):
        if value < 0:
            raise ValueError(f"{name} is {value}; pass 0 or more.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; pass 0 or more and less than 1.")
    if not 1 <= num_iterations <= 10**6:
        raise ValueError(f"num_iterations is {num_iterations}; pass 1 to 1,000,000.")

    def weigh(
        cross_gramian: Array, previous: Array, active: Array
    ) -> tuple[Array, Array]:
        return weights(
            cross_gramian,
            previous,
            active,
            regularization=regularization,
            learning_rate=learning_rate,
            momentum=momentum,
            num_iterations=num_iterations,
        )

    return from_cross_gramian(weigh, num_tasks)
