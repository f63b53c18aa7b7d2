"""Task-based flat regions: every task climbs on its own before tasks are combined."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import Aggregator, make_aggregator
from mtl_jax.optim.sharpness import check_radius, move, uphill
from mtl_jax.optim.task_gradients import (
    SharedAndHeads,
    TaskGradientFunction,
    TaskLosses,
    check_heads,
    gradients_by_task,
)


class FlatRegionsState(NamedTuple):
    """State of the two aggregations.

    Attributes:
        plain: State of the one that combines the gradients of the losses.
        flat: State of the one that combines what the steps uphill change in them.
    """

    plain: optax.OptState
    flat: optax.OptState


def flat_perturbation(
    task_gradients: PyTree, params: PyTree, rho: float, adaptive: bool = False
) -> PyTree:
    """A step uphill for every task, each of length `rho` along its own gradient.

        eps_k = rho * g_k / |g_k|                            (SAM)
        eps_k = rho * theta² * g_k / | |theta| * g_k |       (adaptive)

    The norm of each task runs over all leaves given. Parameters that the tasks share
    and those of a head are to be perturbed in calls of their own, so that neither
    drowns the other.

    Args:
        task_gradients: Leaves `[tasks, *shape]`.
        params: Leaves `[*shape]`; only the adaptive step looks at their values.
        rho: Length of the steps.
        adaptive: Whether to scale the steps by the size of each parameter.

    Returns:
        Leaves `[tasks, *shape]` in float32 (float64 for float64 parameters), zero for a
        task whose gradient is.
    """
    return jax.vmap(lambda row: uphill(row, params, rho, adaptive))(task_gradients)


def flat_regions(aggregator: Aggregator, *, direct: bool = False) -> Aggregator:
    """Combine losses and their flatness separately, by the same method.

    Of the gradients `g_k` at the parameters and `s_k` at the worst point nearby for
    task `k`, the update is

        d = A(g_1, ..., g_K) + A(s_1 - g_1, ..., s_K - g_K),

    with `A` the aggregator: `g_k` makes the loss small, `s_k - g_k` makes its
    surroundings flat, and conflicts are resolved within each kind. Both aggregations
    have a state of their own, and random methods draw independently. With `direct` the
    update is `A(s_1, ..., s_K)`, the same where `A` is linear; the authors found it
    clearly worse.

    Zero, opposite and duplicate gradients do what they do to `A`, twice. Where every
    `s_k = g_k` the second term is `A` of zeros. Cost: the aggregation twice; task
    gradients are held twice.

    Args:
        aggregator: The method, `A`.
        direct: Whether to combine the `s_k` alone.

    Returns:
        An aggregator whose `update(task_gradients, state, params=None, *, plain=None,
        losses=None, active=None)` takes the `s_k` as `task_gradients` and the `g_k` as
        `plain`, both of leaves `[tasks, *shape]`. Its state is a `FlatRegionsState`.
        With `direct` it ignores `plain`, and the state is that of `aggregator`.

    Raises:
        ValueError: From `update`, if `plain` is missing.

    References:
        Phan et al., Improving Multi-task Learning via Seeking Task-based Flat Regions,
        2022, https://arxiv.org/abs/2211.13723.
    """

    def init(params: optax.Params) -> optax.OptState:
        state = aggregator.init(params)
        return state if direct else FlatRegionsState(state, _with_other_keys(state))

    def update(
        task_gradients: PyTree,
        state: Any,
        params: optax.Params | None = None,
        *,
        plain: PyTree | None = None,
        losses: Float[Array, " tasks"] | None = None,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        extra.update(losses=losses, active=active)
        if direct:
            return aggregator.update(task_gradients, state, params, **extra)
        if plain is None:
            raise ValueError(
                "plain is None; pass the task gradients at the parameters themselves, "
                "beside those at the perturbed parameters."
            )
        flat = jax.tree.map(jnp.subtract, task_gradients, plain)
        down, plain_state = aggregator.update(plain, state.plain, params, **extra)
        level, flat_state = aggregator.update(flat, state.flat, params, **extra)
        total = jax.tree.map(jnp.add, down, level)
        return total, FlatRegionsState(plain_state, flat_state)

    return make_aggregator(init, update)


def flat_value_and_grad(
    task_losses: TaskLosses,
    aggregator: Aggregator,
    rho: float,
    *,
    adaptive: bool = False,
    direct: bool = False,
) -> TaskGradientFunction:
    """Seek parameters around which the loss of every task is low and flat.

    For each task `k`, with shared parameters `theta` and its own head `phi_k`:

    1. the gradients at `(theta, phi_k)`: `g_k` of the shared parameters, `h_k` of the
       head;
    2. steps uphill from both, each of length `rho` (see `flat_perturbation`);
    3. the gradients at the point where these lead: `s_k` and that of the head.

    The shared parameters get `flat_regions(aggregator, direct=direct)` of all `g_k` and
    `s_k`, each head its gradient of step 3. Every evaluation gets the same arguments,
    hence the same batch. To be called under `jax.jit`, which computes what the forward
    passes of step 1 have in common once. Cost: about two gradients for each task;
    its shared gradients are held twice.

    Args:
        task_losses: Task name -> `loss(shared, head, *args)`, a scalar; their order is
            that of the tasks.
        aggregator: How to combine task gradients.
        rho: Length of the steps uphill, in the units of the parameters, or relative to
            them (adaptive). The authors use 2 and `adaptive=True` on Multi-MNIST.
        adaptive: Whether to scale the steps by the size of each parameter.
        direct: Whether to combine the `s_k` alone.

    Returns:
        A function `(shared, heads, state, *args, active=None) -> (losses,
        (shared_gradient, head_gradients), state)`. `heads` maps each task to the
        parameters that only it has, an empty tree if none. `losses` is `[tasks]`, at
        the parameters themselves. The first `state` is `flat_regions(aggregator,
        direct=direct).init(shared)`. The head of an inactive task gets zeros.

    Raises:
        ValueError: If `rho` is negative or, from the function, if `heads` and
            `task_losses` do not name the same tasks.

    References:
        Phan et al., Improving Multi-task Learning via Seeking Task-based Flat Regions,
        2022, https://arxiv.org/abs/2211.13723.
    """
    check_radius(rho)
    combine = flat_regions(aggregator, direct=direct)

    def evaluate(
        shared: PyTree,
        heads: Mapping[str, PyTree],
        state: optax.OptState,
        *args: PyTree,
        active: Bool[Array, " tasks"] | None = None,
    ) -> tuple[Float[Array, " tasks"], SharedAndHeads, optax.OptState]:
        check_heads(task_losses, heads)
        losses, plain, head_gradients = gradients_by_task(
            task_losses, [shared] * len(task_losses), heads, *args
        )
        steps = flat_perturbation(plain, shared, rho, adaptive)
        points = [
            move(shared, jax.tree.map(lambda leaf, k=k: leaf[k], steps))
            for k in range(len(task_losses))
        ]
        moved_heads = uphill_heads(head_gradients, heads, rho, adaptive)
        _, rows, head_gradients = gradients_by_task(
            task_losses, points, moved_heads, *args, active=active
        )
        gradient, state = combine.update(
            rows, state, shared, plain=plain, losses=losses, active=active
        )
        return losses, (gradient, head_gradients), state

    return evaluate


def uphill_heads(
    gradients: Mapping[str, PyTree],
    heads: Mapping[str, PyTree],
    rho: float,
    adaptive: bool,
) -> dict[str, PyTree]:
    """Move every head uphill by a step of length `rho` of its own."""
    return {
        name: move(head, uphill(gradients[name], head, rho, adaptive))
        for name, head in heads.items()
    }


def _with_other_keys(state: optax.OptState) -> optax.OptState:
    """A state that differs in its random keys alone, so that draws are independent."""

    def other(leaf: Array) -> Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, 1) if is_key else leaf

    return jax.tree.map(other, state)
