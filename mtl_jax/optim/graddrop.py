"""GradDrop: pick one sign a coordinate, at random by how much the tasks agree."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    accumulation_dtype,
    from_rows,
)
from mtl_jax.optim.rows import along_tasks


def drop(
    task_gradients: PyTree,
    uniforms: PyTree,
    active: Bool[Array, " tasks"] | None = None,
    *,
    leak: float | Sequence[float] | np.ndarray | Array = 0.0,
) -> PyTree[Float[Array, "..."]]:
    """Sum the entries of one sign in every coordinate.

    Args:
        task_gradients: Pytree of leaves `[tasks, *shape]`.
        uniforms: Pytree of leaves `[*shape]` in [0, 1): a coordinate keeps its positive
            entries where the number is less than the purity, else its negative ones.
        active: Which tasks are present; all by default.
        leak: Share of a task's gradient that is never dropped, one for all or one each.

    Returns:
        Pytree of leaves `[*shape]`, each of the dtype of its gradients, summed in
        float32 (float64 for float64 leaves).
    """

    def combine(leaf: Array, uniform: Array) -> Array:
        dtype = accumulation_dtype(leaf)
        entries = leaf.astype(dtype)
        if active is not None:
            entries = jnp.where(along_tasks(active, leaf), entries, 0)
        positive, negative = jnp.maximum(entries, 0), jnp.minimum(entries, 0)
        # ½ (1 + sum g / sum |g|), without its cancellation.
        above, below = jnp.sum(positive, axis=0), jnp.sum(negative, axis=0)
        total = above - below
        purity = above / jnp.where(total > 0, total, 1)

        kept = jnp.broadcast_to(jnp.asarray(leak, dtype), leaf.shape[:1])
        kept = along_tasks(kept, leaf)
        result = jnp.where(
            uniform.astype(dtype) < purity,
            jnp.sum((1 - kept) * positive, axis=0),
            jnp.sum((1 - kept) * negative, axis=0),
        )
        return (result + jnp.sum(kept * entries, axis=0)).astype(leaf.dtype)

    return jax.tree.map(combine, task_gradients, uniforms)


def graddrop(
    num_tasks: int, *, leak: float | Sequence[float] = 0.0, seed: int = 0
) -> Aggregator:
    """Let each coordinate move by the gradients of one sign only.

    In each coordinate the positive sign has purity `P = ½ (1 + sum_k g_k / sum_k
    |g_k|)`, the share of the positive entries. One uniform number `U`, shared by all
    tasks, keeps the positive entries where `U < P` and the negative ones elsewhere:
    `d = sum_k (l_k + (1 − l_k) M_k) g_k` with `M_k` 1 for the sign that is kept and 0
    for the other, `l_k` the leak. With one leak for all, `d` is the plain sum on
    average, `P sum(positive) + (1 − P) sum(negative) = sum_k g_k`: what the method adds
    is noise, where tasks disagree and in no other place. The paper drops a coordinate
    where `U = P`; here it is negative then.

    A coordinate in which all gradients are zero stays zero, duplicates add up, and
    opposite gradients do not cancel: each coordinate goes one way or the other. Cost:
    a few passes over the task gradients; no inner products, and nothing is
    communicated. The random numbers do not depend on how the gradients are sharded.

    Args:
        num_tasks: Length of the leading axis of every gradient.
        leak: Share of a task's gradient that is never dropped, in [0, 1]; one for all
            or one each. 1 gives the plain sum.
        seed: Seed of the random numbers; the key is kept in the state.

    Returns:
        An aggregator; see `from_rows`.

    Raises:
        ValueError: If `num_tasks < 1`, or `leak` is neither one number nor one a task,
            or not in [0, 1].

    References:
        Chen et al., Just Pick a Sign: Optimizing Deep Multitask Models with Gradient
        Sign Dropout, NeurIPS 2020, https://arxiv.org/abs/2010.06808.
    """
    shares = np.asarray(leak, float)
    in_range = np.all((shares >= 0) & (shares <= 1))
    if shares.shape not in ((), (num_tasks,)) or not in_range:
        raise ValueError(
            f"leak is {leak}; pass one number in [0, 1], or one for each of the "
            f"{num_tasks} tasks."
        )

    def combine(
        task_gradients: PyTree, active: Bool[Array, " tasks"], key: PRNGKeyArray
    ) -> PyTree:
        leaves, structure = jax.tree.flatten(task_gradients)
        keys = jax.random.split(key, max(len(leaves), 1))
        uniforms = [
            jax.random.uniform(keys[i], leaf.shape[1:], accumulation_dtype(leaf))
            for i, leaf in enumerate(leaves)
        ]
        return drop(
            task_gradients, jax.tree.unflatten(structure, uniforms), active, leak=shares
        )

    return from_rows(combine, num_tasks, seed=seed)
