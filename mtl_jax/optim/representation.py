"""Task gradients at the features that tasks share, for any model."""

from collections.abc import Callable, Mapping

import jax
import optax
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import Aggregator
from mtl_jax.optim.task_gradients import (
    SharedAndHeads,
    TaskGradientFunction,
    TaskLosses,
    check_heads,
    gradients_by_task,
)


def at_representation(
    trunk: Callable[..., PyTree], task_losses: TaskLosses, aggregator: Aggregator
) -> TaskGradientFunction:
    """Combine task gradients at the trunk's features: as cheap as a plain sum.

    With features `z = trunk(theta)`, the aggregator combines the gradients `dL_k / dz`
    of all examples together into one, `d`, and a single backward pass takes it through
    the trunk: `(dz / dtheta)ᵀ d`. With `mgda` this is MGDA-UB, with `aligned_mtl`
    Aligned-MTL-UB. Linear methods give what they give at the parameters; others weigh
    the tasks by angles between gradients of features, which are not those between
    gradients of parameters.

    Zero, opposite and duplicate gradients do what they do to the aggregator; tasks
    that look at examples apart have gradients orthogonal to each other. Cost: one
    forward and one backward pass of the trunk, one of every head, and the features of
    the batch for every task.

    Args:
        trunk: `trunk(params, *args)` gives the features, an array or a tree of them.
        task_losses: Task name -> `loss(features, head, *args)`, a scalar; their order
            is that of the tasks.
        aggregator: How to combine gradients of leaves `[tasks, *shape]`, shaped like
            the features.

    Returns:
        A function `(params, heads, state, *args, active=None) -> (losses,
        (trunk_gradient, head_gradients), state)`. `heads` maps each task to the
        parameters that only it has, an empty tree if none. `losses` is `[tasks]`. The
        first `state` is `aggregator.init(features)`, where `jax.eval_shape(trunk,
        params, *args)` will do for the features of methods that keep no past gradients.
        The head of an inactive task gets zeros.

    Raises:
        ValueError: From the function, if `heads` and `task_losses` do not name the same
            tasks.

    References:
        Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization,
        NeurIPS 2018, https://arxiv.org/abs/1810.04650.
        Senushkin et al., Independent Component Alignment for Multi-Task Learning,
        CVPR 2023, https://arxiv.org/abs/2305.19000.
    """

    def evaluate(
        params: PyTree,
        heads: Mapping[str, PyTree],
        state: optax.OptState,
        *args: PyTree,
        active: Bool[Array, " tasks"] | None = None,
    ) -> tuple[Float[Array, " tasks"], SharedAndHeads, optax.OptState]:
        check_heads(task_losses, heads)
        features, pull_back = jax.vjp(lambda params: trunk(params, *args), params)
        losses, rows, head_gradients = gradients_by_task(
            task_losses, [features] * len(task_losses), heads, *args, active=active
        )
        combined, state = aggregator.update(
            rows, state, features, losses=losses, active=active
        )
        (gradient,) = pull_back(combined)
        return losses, (gradient, head_gradients), state

    return evaluate
