"""SAMO: sharpness-aware task gradients at the price of one ascent gradient."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.optim.aggregator import Aggregator, accumulation_dtype, all_active
from mtl_jax.optim.flat_regions import uphill_heads
from mtl_jax.optim.sharpness import check_radius, global_norm, move, uphill
from mtl_jax.optim.task_gradients import (
    SharedAndHeads,
    TaskGradientFunction,
    TaskLosses,
    check_heads,
    gradients_by_task,
)


def spsa(
    loss: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    key: PRNGKeyArray,
    radius: float = 0.01,
) -> PyTree:
    """Estimate a gradient from two values (simultaneous perturbation).

    `(loss(theta + r z) - loss(theta - r z)) / (2 r) * z` with `z` standard normal. Its
    mean over `z` is the gradient, up to order `r²`; one draw knows only how the loss
    changes along `z`.

    Args:
        loss: Scalar function of the parameters.
        params: Where to estimate the gradient.
        key: Typed PRNG key.
        radius: Size of the perturbation of each parameter, `r`.

    Returns:
        A tree like `params` in float32 (float64 for float64 parameters).

    References:
        Spall, Multivariate stochastic approximation using a simultaneous perturbation
        gradient approximation, IEEE Transactions on Automatic Control 37, 1992.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    draws = [
        jax.random.normal(k, leaf.shape, accumulation_dtype(leaf))
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    direction = jax.tree.unflatten(structure, draws)
    ahead = move(params, jax.tree.map(lambda z: radius * z, direction))
    behind = move(params, jax.tree.map(lambda z: -radius * z, direction))
    slope = (loss(ahead) - loss(behind)) / (2 * radius)
    return jax.tree.map(lambda z: slope.astype(z.dtype) * z, direction)


def samo_perturbation(
    mean_gradient: PyTree,
    estimate: PyTree,
    params: PyTree,
    rho: float,
    *,
    beta: float = 0.5,
    adaptive: bool = False,
) -> PyTree:
    """The step uphill for one task: part common to all tasks, part its own.

    With `g` the gradient of the mean loss and `e` an estimate of the task's, rescaled
    in every leaf to the length of `g`, the step has length `rho` along

        (1 - beta) * g + beta * e * |g| / |e|        (leaf by leaf)

    and is scaled by the parameters as in `sharpness_aware` if it is adaptive.

    Args:
        mean_gradient: Gradient of the mean loss, a tree like `params`.
        estimate: Rough gradient of the task's loss, a tree like `params`. A leaf that
            is zero adds nothing.
        params: The parameters that all tasks share.
        rho: Length of the step.
        beta: Share of the task's own estimate.
        adaptive: Whether to scale the step by the size of each parameter.

    Returns:
        A tree like `params` in float32 (float64 for float64 parameters).
    """

    def mix(leaf: Array, own: Array) -> Array:
        dtype = accumulation_dtype(leaf)
        leaf, own = leaf.astype(dtype), own.astype(dtype)
        length = global_norm(own)
        own = own / jnp.where(length > 0, length, 1)
        return (1 - beta) * leaf + beta * global_norm(leaf) * own

    direction = jax.tree.map(mix, mean_gradient, estimate)
    return uphill(direction, params, rho, adaptive)


def samo(
    task_losses: TaskLosses,
    aggregator: Aggregator,
    rho: float = 0.001,
    *,
    beta: float = 0.5,
    adaptive: bool = False,
    radius: float = 0.01,
) -> TaskGradientFunction:
    """Take every task's gradient at a point that is bad for all tasks and for it.

    One backward pass gives the gradient of the mean loss and those of the heads; two
    values of each task's loss give a rough estimate of its own gradient (`spsa`).
    Mixed, they lead each task uphill (`samo_perturbation`); its head climbs along its
    own gradient. The task gradients there are combined by `aggregator`, each head gets
    its gradient there. Every evaluation gets the same arguments, hence the same batch.
    To be called under `jax.jit`. Cost: beside the task gradients, one backward pass and
    `2 tasks` values, where `flat_value_and_grad` takes `tasks` more backward passes.

    Args:
        task_losses: Task name -> `loss(shared, head, *args)`, a scalar; their order is
            that of the tasks.
        aggregator: How to combine task gradients.
        rho: Length of the steps uphill, of shared parameters and heads apart.
        beta: Share of the task's own estimate in the direction of its step.
        adaptive: Whether to scale the steps by the size of each parameter.
        radius: Size of the perturbations behind the estimate.

    Returns:
        A function `(shared, heads, state, key, *args, active=None) -> (losses,
        (shared_gradient, head_gradients), state)`. `heads` maps each task to the
        parameters that only it has, an empty tree if none; `key` is a typed PRNG key,
        fresh every step. `losses` is `[tasks]`, at the parameters themselves. The first
        `state` is `aggregator.init(shared)`. An inactive task does not count in the
        mean loss, and its head gets zeros.

    Raises:
        ValueError: If `rho` is negative, `radius` is not positive or `beta` is outside
            [0, 1], or, from the function, if `heads` and `task_losses` do not name the
            same tasks.

    References:
        Ban, Subramani and Ji, SAMO: A Lightweight Sharpness-Aware Approach for
        Multi-Task Optimization with Joint Global-Local Perturbation, ICCV 2025,
        https://arxiv.org/abs/2507.07883.
    """
    check_radius(rho)
    if radius <= 0:
        raise ValueError(f"radius is {radius}; pass a positive size.")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; pass a share in [0, 1].")

    def evaluate(
        shared: PyTree,
        heads: Mapping[str, PyTree],
        state: optax.OptState,
        key: PRNGKeyArray,
        *args: PyTree,
        active: Bool[Array, " tasks"] | None = None,
    ) -> tuple[Float[Array, " tasks"], SharedAndHeads, optax.OptState]:
        check_heads(task_losses, heads)
        present = all_active(len(task_losses)) if active is None else active

        def mean_loss(shared: PyTree, heads: Mapping[str, PyTree]):
            losses = jnp.stack(
                [loss(shared, heads[name], *args) for name, loss in task_losses.items()]
            )
            count = jnp.maximum(jnp.sum(present), 1).astype(losses.dtype)
            return jnp.sum(jnp.where(present, losses, 0)) / count, losses

        (_, losses), (mean_gradient, head_gradients) = jax.value_and_grad(
            mean_loss, (0, 1), has_aux=True
        )(shared, heads)

        points = []
        keys = jax.random.split(key, len(task_losses))
        for (name, loss), task_key in zip(task_losses.items(), keys, strict=True):

            def value(params: PyTree, loss=loss, name=name) -> Array:
                return loss(params, heads[name], *args)

            estimate = spsa(value, shared, task_key, radius)
            step = samo_perturbation(
                mean_gradient, estimate, shared, rho, beta=beta, adaptive=adaptive
            )
            points.append(move(shared, step))
        moved_heads = uphill_heads(head_gradients, heads, rho, adaptive)
        _, rows, head_gradients = gradients_by_task(
            task_losses, points, moved_heads, *args, active=active
        )
        gradient, state = aggregator.update(
            rows, state, shared, losses=losses, active=active
        )
        return losses, (gradient, head_gradients), state

    return evaluate
