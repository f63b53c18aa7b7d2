"""FairGrad: share the improvement by alpha-fairness."""

from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, from_weights
from mtl_jax.optim.proportional import fair_weights
from mtl_jax.optim.sum import weights as sum_weights


def weights(
    gramian: Float[Array, "tasks tasks"],
    active: Bool[Array, " tasks"] | None = None,
    *,
    alpha: float = 2.0,
) -> Float[Array, " tasks"]:
    """Weights with `(G w)_k = w_k^(−1/alpha)`.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.
        alpha: Exponent of fairness, 0 or more.

    Returns:
        Weights of the Gramian's dtype, 0 for inactive tasks; see `fair_weights`.
    """
    if alpha == 0:
        return sum_weights(gramian, active)
    return fair_weights(gramian, active, alpha=alpha)


def fairgrad(num_tasks: int, *, alpha: float = 2.0) -> Aggregator:
    """Maximise the alpha-fair utility of the improvements of all tasks.

    `d = sum_k w_k g_k` with `w > 0` and `(g_k · d)^alpha w_k = 1` for every task; it
    points to the maximum of `sum_k (g_k · d)^(1 − alpha) / (1 − alpha)` over a ball.
    `alpha = 0` is the sum, 1 Nash-MTL (proportional fairness), and towards infinity
    only the least improved tasks count. Scaling all gradients by `s` scales `d` by
    `s^((1 − alpha) / (1 + alpha))`: for `alpha > 1`, small gradients make large steps.
    Exact for any norms: a Newton iteration on unit gradients, 5 to 10 steps as a rule.

    `d · g_k > 0` for every task but zero gradients, which are skipped, and those that
    no direction improves all at once, such as opposite ones: these are held,
    `d · g_k = 0`, and the others share what is orthogonal to them. So `d = 0` for
    `[g, -g]` and `[g, -3g]`, and where a positive combination of all gradients is zero.
    A combination of unit gradients counts as zero up to about the root of the
    precision, 1e-3 in float32; just above, `d` is long where `alpha > 1`. Duplicates
    count twice. Cost: the Gramian and as many small linear systems as steps.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        alpha: Exponent of fairness, 0 or more; up to 10 is accurate in float32.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1` or `alpha < 0`.

    References:
        Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024,
        https://arxiv.org/abs/2402.15638.
    """
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}; pass an exponent of 0 or more.")

    def weigh(gramian: Array, active: Array) -> Array:
        return weights(gramian, active, alpha=alpha)

    return from_weights(weigh, num_tasks)
