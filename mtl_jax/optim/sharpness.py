"""Sharpness-aware gradients: descend from the worst point nearby."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtl_jax.optim.aggregator import accumulation_dtype

ValueAndGradient = Callable[..., tuple[Any, PyTree]]


def sharpness_aware(
    value_and_grad: ValueAndGradient,
    rho: float,
    *,
    adaptive: bool = False,
    ascent: ValueAndGradient | None = None,
) -> ValueAndGradient:
    """Evaluate a gradient at parameters first moved uphill by a step of length `rho`.

    With `g` the ascent gradient at `theta`, the gradient is taken at `theta + eps`,

        eps = rho * g / |g|                            (SAM)
        eps = rho * theta² * g / | |theta| * g |       (adaptive: invariant to scale)

    with norms over all parameters together. Both evaluations get the same arguments,
    hence the same batch. `eps` is computed in float32 (float64 for float64 parameters)
    and is zero where the ascent gradient is. Cost: two gradients in place of one.

    Args:
        value_and_grad: Function `(params, *args) -> (value, gradient)`, as made by
            `jax.value_and_grad`. With a separate `ascent` its gradient may be any tree,
            such as one stacked by task.
        rho: Radius of the step uphill, in the units of the parameters (SAM) or relative
            to them (adaptive).
        adaptive: Whether to scale the step by the size of each parameter.
        ascent: Function `(params, *args) -> (value, gradient)` that gives the uphill
            direction, its gradient shaped like `params`, its value unused. By default
            `value_and_grad` itself.

    Returns:
        A function of the same arguments as `value_and_grad`. Both the value and the
        gradient it returns are those of `value_and_grad` at the moved parameters, so
        that losses and statistics belong to the same point as the gradient.

    Raises:
        ValueError: If `rho` is negative.

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving
        Generalization, ICLR 2021, https://arxiv.org/abs/2010.01412.
        Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
        Learning of Deep Neural Networks, ICML 2021, https://arxiv.org/abs/2102.11600.
    """
    if rho < 0:
        raise ValueError(f"rho is {rho}; pass a radius of 0 or more.")
    ascend = value_and_grad if ascent is None else ascent

    def perturbed_value_and_grad(params: PyTree, *args: Any, **kwargs: Any):
        _, gradient = ascend(params, *args, **kwargs)
        moved = _move_uphill(params, gradient, rho, adaptive)
        return value_and_grad(moved, *args, **kwargs)

    return perturbed_value_and_grad


def _move_uphill(params: PyTree, gradient: PyTree, rho: float, adaptive: bool):
    def widen(leaf: Array) -> Array:
        return leaf.astype(accumulation_dtype(leaf))

    wide = jax.tree.map(widen, params)
    direction = jax.tree.map(widen, gradient)
    if adaptive:
        direction = jax.tree.map(lambda p, g: jnp.abs(p) * g, wide, direction)
    length = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(direction)))
    scale = jnp.where(length > 0, rho / jnp.where(length > 0, length, 1), 0)

    def move(param: Array, wide_param: Array, step: Array) -> Array:
        step = step * scale.astype(step.dtype)
        if adaptive:
            step = jnp.abs(wide_param) * step
        return (wide_param + step).astype(param.dtype)

    return jax.tree.map(move, params, wide, direction)
