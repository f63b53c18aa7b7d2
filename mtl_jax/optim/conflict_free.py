"""ConFIG: the direction that makes the same angle with every task gradient."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.optim.aggregator import Aggregator, from_weights, unit_rows
from mtl_jax.optim.nonnegative import precise_matmul
from mtl_jax.optim.spectrum import equal_angles


def weights(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, " tasks"]:
    """Weights of the direction of equal angles, as long as all projections together.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.

    Returns:
        Weights of the Gramian's dtype, of any sign, 0 for inactive tasks and zero
        gradients.
    """
    cosines, norms, _ = unit_rows(gramian, active)
    present = norms > 0
    values = equal_angles(cosines, present)
    # With x = sum_k v_k u_k: the length is sum_k g_k · x / |x|, over another |x|.
    product = precise_matmul(cosines, values)
    squared = jnp.sum(values * product)
    relative = jnp.sum(norms * product) / jnp.where(squared > 0, squared, 1)
    return jnp.where(present, values * relative / jnp.where(present, norms, 1), 0)


def conflict_free(num_tasks: int) -> Aggregator:
    """Step where all task gradients have the same cosine with the step.

    With `U` the unit task gradients, `x = U⁺ 1` and `x̂ = x / |x|`, the update is
    `d = (sum_k g_k · x̂) x̂`. While the gradients are independent, `d · g_k > 0` for
    every task. Its direction is that of `imtl_g`; its length is the sum of the
    projections, and so shrinks with conflict.

    A zero gradient is left out; duplicates change nothing but their count in the
    length; opposite gradients have no direction of equal positive angles, and what
    there is of one is orthogonal to both, so that they give 0 by themselves. Cost: the
    Gramian and the eigenvalues of a `tasks x tasks` matrix.

    Args:
        num_tasks: Length of the leading axis of every gradient.

    Returns:
        An aggregator; see `from_weights`.

    Raises:
        ValueError: If `num_tasks < 1`.

    References:
        Liu et al., ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks, ICLR 2025, https://arxiv.org/abs/2408.11104.
    """
    return from_weights(weights, num_tasks)
