"""GSAM: descend from the worst point nearby, and close its gap to the point itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtl_jax.optim.aggregator import accumulation_dtype
from mtl_jax.optim.sharpness import (
    ValueAndGradient,
    check_radius,
    global_norm,
    inner_product,
    move,
    uphill,
)


def gsam(
    value_and_grad: ValueAndGradient,
    rho: float,
    *,
    alpha: float = 0.4,
    adaptive: bool = False,
) -> ValueAndGradient:
    """Minimise the worst loss nearby together with its gap to the loss itself.

    With `g` the gradient at `theta` and `g_sam` that at `theta + eps` (see
    `sharpness_aware`), the result is

        g_sam - alpha * (g - (g · u) u),    u = g_sam / |g_sam|,

    with norms over all parameters together. To first order the term subtracted leaves
    the loss at `theta + eps` alone and raises the one at `theta`, so that the gap
    between the two, which measures sharpness, shrinks. Both evaluations get the same
    arguments, hence the same batch.

    Where `g` is zero nothing moves, and the result is zero too. Where `g_sam` alone is
    zero all of `g` is orthogonal to it, and the result is `-alpha * g`. Cost: two
    gradients in place of one.

    Args:
        value_and_grad: Function `(params, *args) -> (value, gradient)`, as made by
            `jax.value_and_grad`.
        rho: Radius of the step uphill, in the units of the parameters (SAM) or relative
            to them (adaptive).
        alpha: Weight of the gap; 0 gives `sharpness_aware`.
        adaptive: Whether to scale the step by the size of each parameter.

    Returns:
        A function of the same arguments as `value_and_grad`. Its value is that at the
        moved parameters.

    Raises:
        ValueError: If `rho` or `alpha` is negative.

    References:
        Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training,
        ICLR 2022, https://arxiv.org/abs/2203.08065.
    """
    check_radius(rho)
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}; pass a weight of 0 or more.")

    def perturbed_value_and_grad(params: PyTree, *args: Any, **kwargs: Any):
        _, gradient = value_and_grad(params, *args, **kwargs)
        moved = move(params, uphill(gradient, params, rho, adaptive))
        value, perturbed = value_and_grad(moved, *args, **kwargs)
        return value, _lean(perturbed, gradient, alpha)

    return perturbed_value_and_grad


def _lean(perturbed: PyTree, gradient: PyTree, alpha: float) -> PyTree:
    """Subtract `alpha` of the component of one gradient orthogonal to another."""
    length = global_norm(perturbed)
    safe = jnp.where(length > 0, length, 1)
    # Two divisions: the square of a small norm could underflow.
    share = inner_product(gradient, perturbed) / safe / safe

    def subtract(along: Array, leaf: Array) -> Array:
        dtype = accumulation_dtype(along)
        wide = along.astype(dtype)
        orthogonal = leaf.astype(dtype) - share.astype(dtype) * wide
        return (wide - alpha * orthogonal).astype(along.dtype)

    return jax.tree.map(subtract, perturbed, gradient)
