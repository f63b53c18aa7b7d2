"""Exact gradients of task losses in what they share and in the head of each.

The functions here take the model as one loss a task, `loss(shared, head, *args)`,
where `shared` is whatever the tasks share: parameters, or the features that a trunk
has computed from them.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

TaskLosses = Mapping[str, Callable[..., Float[Array, ""]]]
SharedAndHeads = tuple[PyTree, dict[str, PyTree]]
# (shared, heads, state, *args, active=None) -> (losses, gradients, state)
TaskGradientFunction = Callable[
    ..., tuple[Float[Array, " tasks"], SharedAndHeads, optax.OptState]
]


def gradients_by_task(
    task_losses: TaskLosses,
    shared: Sequence[PyTree],
    heads: Mapping[str, PyTree],
    *args: PyTree,
    active: Bool[Array, " tasks"] | None = None,
) -> tuple[Float[Array, " tasks"], PyTree, dict[str, PyTree]]:
    """Value and gradient of every task's loss, each at a point of its own.

    One task after another and not mapped over tasks: the losses may differ in kind and
    the heads in structure, and one jaxlib release computes the mapped pullback of a
    normalisation wrongly. What the tasks' forward passes have in common is computed
    once under `jax.jit`.

    Args:
        task_losses: Task name -> `loss(shared, head, *args)`; their order is that of
            the tasks.
        shared: For each task, where its gradient is taken.
        heads: Task name -> the parameters that only this task has, any tree.
        *args: What the losses take besides, such as a batch.
        active: Which tasks are present; all by default.

    Returns:
        `(losses, rows, head_gradients)`: the losses `[tasks]`, the shared gradients as
        leaves `[tasks, *shape]`, and those of the heads by task, zero for inactive
        tasks.
    """
    losses, rows, head_gradients = [], [], {}
    for k, (name, loss) in enumerate(task_losses.items()):
        value, (row, head_gradient) = jax.value_and_grad(loss, (0, 1))(
            shared[k], heads[name], *args
        )
        losses.append(value)
        rows.append(row)
        if active is not None:
            head_gradient = jax.tree.map(
                lambda leaf, k=k: jnp.where(active[k], leaf, 0), head_gradient
            )
        head_gradients[name] = head_gradient
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return jnp.stack(losses), stacked, head_gradients


def check_heads(task_losses: TaskLosses, heads: Mapping[str, PyTree]) -> None:
    """Raise ValueError unless there is one head for every task."""
    if not task_losses or set(task_losses) != set(heads):
        raise ValueError(
            f"task_losses has {sorted(task_losses)}, heads has {sorted(heads)}; give "
            "every task a loss and a head, an empty tree if it has no parameters."
        )
