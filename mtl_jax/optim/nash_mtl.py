"""Nash-MTL: the direction on which tasks that bargain would agree."""

from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, from_weights
from mtl_jax.optim.proportional import fair_weights


def weights(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Weights with `(G w)_k = 1 / w_k`.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the Gramian's dtype, 0 for inactive tasks; see `fair_weights`.
    """
    return fair_weights(gramian, active, alpha=1.0)


def nash_mtl(num_tasks: int) -> Aggregator:
    """Step along the Nash bargaining solution of the tasks.

    `d = sum_k w_k g_k` with `w > 0` and `w_k (g_k · d) = 1` for every task; it points
    to the maximum of `prod_k (g_k · d)` over a ball. Each task adds 1 to
    `|d|² = sum_k w_k (g_k · d)`, so that `|d|` is the root of the number of tasks
    whatever the gradients: scaling any of them changes nothing, and the learning rate
    alone sets the length of the step. Exact: a Newton iteration on unit gradients, 5 to
    10 steps; the published iteration solves a convex program on the host, stops short
    on unequal norms, and has to reuse old weights.

    Zero gradients are skipped. Where a positive combination of some tasks' gradients
    is zero, as for opposite ones, there is nothing to bargain for: those tasks are
    held, `d · g_k = 0`, and the others bargain for what is orthogonal to them. So
    `d = 0` for `[g, -g]` and `[g, -3g]`. A combination of unit gradients counts as zero
    up to about the root of the precision, 1e-3 in float32. Duplicates count twice.
    Cost: the Gramian and as many small linear systems as steps.

    Args:
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022,
        https://arxiv.org/abs/2202.01017.
    """
    return from_weights(weights, num_tasks)
