"""Sharpness-aware gradients: descend from the worst point nearby."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

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
    check_radius(rho)
    ascend = value_and_grad if ascent is None else ascent

    def perturbed_value_and_grad(params: PyTree, *args: Any, **kwargs: Any):
        _, gradient = ascend(params, *args, **kwargs)
        moved = move(params, uphill(gradient, params, rho, adaptive))
        return value_and_grad(moved, *args, **kwargs)

    return perturbed_value_and_grad


def uphill(
    gradient: PyTree, params: PyTree, rho: float, adaptive: bool = False
) -> PyTree:
    """The step of length `rho` along a gradient, zero where the gradient is.

    Args:
        gradient: A tree like `params`, with one norm over all its leaves together.
        params: Where the step starts; only the adaptive one looks at their values.
        rho: Length of the step.
        adaptive: Whether to scale the step by the size of each parameter, and to
            measure its length relative to them.

    Returns:
        The step, a tree like `params` in float32 (float64 for float64 parameters).
    """

    def direct(param: Array, leaf: Array) -> Array:
        leaf = leaf.astype(accumulation_dtype(param))
        return jnp.abs(param).astype(leaf.dtype) * leaf if adaptive else leaf

    direction = jax.tree.map(direct, params, gradient)
    length = global_norm(direction)
    scale = jnp.where(length > 0, rho / jnp.where(length > 0, length, 1), 0)

    def stretch(param: Array, step: Array) -> Array:
        step = step * scale.astype(step.dtype)
        return jnp.abs(param).astype(step.dtype) * step if adaptive else step

    return jax.tree.map(stretch, params, direction)


def move(params: PyTree, step: PyTree) -> PyTree:
    """Add a step to the parameters in its own precision, then round to theirs."""
    return jax.tree.map(
        lambda param, by: (param.astype(by.dtype) + by).astype(param.dtype),
        params,
        step,
    )


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Length of all leaves together, as one vector."""
    return jnp.sqrt(inner_product(tree, tree))


def inner_product(tree: PyTree, other: PyTree) -> Float[Array, ""]:
    """Inner product of two trees as vectors, in float32 (float64 if any leaf is)."""
    dtype = accumulation_dtype((tree, other))
    products = jax.tree.map(
        lambda a, b: jnp.sum(a.astype(dtype) * b.astype(dtype)), tree, other
    )
    return jax.tree.reduce(jnp.add, products, jnp.zeros((), dtype))


def check_radius(rho: float) -> None:
    """Raise ValueError if the length of a step uphill is negative."""
    if rho < 0:
        raise ValueError(f"rho is {rho}; pass a radius of 0 or more.")
