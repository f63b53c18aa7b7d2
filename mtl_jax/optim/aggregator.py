"""Task gradients in, one gradient out: the Gramian and the aggregator protocol.

`task_gradients` is a pytree like the parameters whose leaves carry a leading task
axis, `[tasks, *shape]`. Nearly every gradient-surgery method weighs the tasks by
looking only at the Gramian `G[i, j] = g_i · g_j`, so a method is a pure function
`weights(gramian, ...)` of a small matrix, and `from_weights` makes it an aggregator.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree
from optax.experimental import aggregating

Aggregator = aggregating.Aggregator


class AggregatorState(NamedTuple):
    """State of a method that weighs tasks by their Gramian.

    Attributes:
        weights: The weights of the latest update, zeros before the first.
        key: A typed PRNG key for random methods, None for deterministic ones.
        memory: What the method carries from step to step, None for stateless ones.
    """

    weights: Float[Array, " tasks"]
    key: PRNGKeyArray | None
    memory: PyTree


class RowState(NamedTuple):
    """State of a method that needs the task gradients themselves.

    Attributes:
        key: A typed PRNG key for random methods, None for deterministic ones.
        memory: What the method carries from step to step, None for stateless ones.
    """

    key: PRNGKeyArray | None
    memory: PyTree


def gramian(task_gradients: PyTree) -> Float[Array, "tasks tasks"]:
    """Inner products of every pair of task gradients.

    Each leaf is contracted in place over all its axes but the first. Under sharding
    every device contracts its own shards, and one all-reduce adds up `tasks x tasks`
    numbers a leaf; no gradient is gathered.

    Args:
        task_gradients: Pytree of floating-point leaves `[tasks, *shape]`.

    Returns:
        The Gramian, float64 if any leaf is float64 and float32 otherwise; products are
        accumulated in that type even where the leaves are bfloat16.

    Raises:
        ValueError: If the tree has no leaves.
    """
    return cross_gramian(task_gradients, task_gradients)


def cross_gramian(first: PyTree, second: PyTree) -> Float[Array, "tasks tasks"]:
    """Inner products of the task gradients of one batch with those of another.

    `A[i, j] = first_i · second_j`. With independent batches its mean is the Gramian of
    the mean gradients, to which the Gramian of one batch adds the noise of the batch.
    It need not be symmetric, and its diagonal can be negative. Contracted as `gramian`.

    Args:
        first: Pytree of floating-point leaves `[tasks, *shape]`.
        second: Pytree of the same structure, shapes and types.

    Returns:
        The matrix, of the type that `gramian` would have.

    Raises:
        ValueError: If the trees have no leaves or different structures.
    """
    dtype = accumulation_dtype((first, second))
    products = jax.tree.leaves(jax.tree.map(_leaf_products, first, second))
    if not products:
        raise ValueError(
            "task_gradients has no leaves; pass a tree of arrays [num_tasks, *shape]."
        )
    return functools.reduce(jnp.add, (product.astype(dtype) for product in products))


def weighted_sum(
    task_gradients: PyTree, weights: Float[Array, " tasks"]
) -> PyTree[Float[Array, "..."]]:
    """Combine task gradients: `sum_k weights[k] * g_k`.

    Args:
        task_gradients: Pytree of leaves `[tasks, *shape]`, finite everywhere.
        weights: One weight a task.

    Returns:
        A pytree of leaves `[*shape]`, each of its own dtype, summed in float32 (float64
        for float64 leaves).
    """

    def combine(leaf: Array) -> Array:
        dtype = accumulation_dtype(leaf)
        scale = weights.astype(dtype).reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.sum(scale * leaf.astype(dtype), axis=0).astype(leaf.dtype)

    return jax.tree.map(combine, task_gradients)


def cosine_similarity(
    gramian: Float[Array, "tasks tasks"],
) -> Float[Array, "tasks tasks"]:
    """Cosine of the angle between every pair of task gradients, 0 for a zero gradient.

    Args:
        gramian: Inner products of the task gradients.

    Returns:
        Cosines in [-1, 1]; the diagonal is 1, or 0 for a zero gradient.
    """
    norms = jnp.sqrt(jnp.diagonal(gramian))
    safe = jnp.where(norms > 0, norms, 1)
    # Two divisions: the product of two small norms could underflow.
    cosines = gramian / safe[:, None] / safe[None, :]
    return jnp.clip(cosines, -1, 1)


def conflict_rate(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> Float[Array, ""]:
    """Share of pairs of active tasks whose gradients point against each other.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.

    Returns:
        The number of pairs with a negative inner product over the number of pairs, in
        [0, 1]; 0 where there are fewer than two active tasks.
    """
    active = all_active(gramian.shape[0]) if active is None else active
    pairs = jnp.triu(active[:, None] & active[None, :], k=1)
    conflicts = jnp.sum(pairs & (gramian < 0)).astype(gramian.dtype)
    return conflicts / jnp.maximum(jnp.sum(pairs), 1).astype(gramian.dtype)


def accumulation_dtype(tree: PyTree) -> jnp.dtype:
    """The type to add up in: float64 if any leaf is float64, float32 otherwise."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree)}
    return jnp.dtype(jnp.float64 if jnp.dtype("float64") in dtypes else jnp.float32)


def unit_rows(
    gramian: Float[Array, "tasks tasks"], active: Bool[Array, " tasks"] | None = None
) -> tuple[Float[Array, "tasks tasks"], Float[Array, " tasks"], Bool[Array, " tasks"]]:
    """Normalise the rows behind a Gramian, so that solvers meet entries of order one.

    The condition number of a raw Gramian is the square of the ratio of the norms; in
    float32 a ratio of 1e4 would leave no digits.

    Args:
        gramian: Inner products of the task gradients.
        active: Which tasks are present; all by default.

    Returns:
        `(cosines, norms, active)`. Inactive tasks and zero gradients are made
        orthogonal unit rows (cosine 1 with themselves, 0 with all others), their norms
        are 0.
    """
    active = all_active(gramian.shape[0]) if active is None else active
    both = active[:, None] & active[None, :]
    gramian = jnp.where(both, gramian, 0)
    identity = jnp.eye(gramian.shape[0], dtype=bool)
    cosines = jnp.where(identity, 1, cosine_similarity(gramian))
    return cosines, jnp.sqrt(jnp.diagonal(gramian)), active


def from_weights(
    weights: Callable[..., Any],
    num_tasks: int,
    *,
    seed: int | None = None,
    memory: Callable[[jnp.dtype], PyTree] | None = None,
    needs_losses: bool = False,
) -> Aggregator:
    """Make an aggregator of a function that weighs tasks by their Gramian.

    The update is `sum_k w_k g_k` with `w = weights(gramian, active)`. What else the
    function is given is decided by the arguments below. A function that ignores the
    Gramian costs nothing for it under `jax.jit`.

    Args:
        weights: Pure function `(gramian [tasks, tasks], active [tasks]) -> [tasks]`
            that gives inactive tasks weight 0.
        num_tasks: Length of the leading axis of every gradient.
        seed: Seed of the key kept in the state; `weights` then takes a fresh `key`
            every step. None for a deterministic method.
        memory: Makes what the method carries from step to step, a pytree of arrays,
            given the dtype of the Gramian; `weights` then takes it as `memory` and
            returns `(weights, memory)`. None for a stateless method.
        needs_losses: Whether `weights` takes `losses`, `[tasks]` in the Gramian's
            dtype.

    Returns:
        An `optax` aggregator. `update(task_gradients, state, params=None, *,
        losses=None, active=None)` takes leaves `[num_tasks, *shape]` and returns leaves
        `[*shape]`; a task with `active[k] == False` counts as absent. The state is an
        `AggregatorState`.

    Raises:
        ValueError: If `num_tasks < 1`, or, from `update`, if a gradient's leading axis
            is not `num_tasks` or the method needs losses and is given none.
    """
    check_num_tasks(num_tasks)

    def init(params: optax.Params) -> AggregatorState:
        dtype = accumulation_dtype(params)
        return AggregatorState(
            weights=jnp.zeros(num_tasks, dtype),
            key=None if seed is None else jax.random.key(seed),
            memory=None if memory is None else memory(dtype),
        )

    def update(
        task_gradients: PyTree,
        state: AggregatorState,
        params: optax.Params | None = None,
        *,
        losses: Float[Array, " tasks"] | None = None,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, AggregatorState]:
        del params, extra
        check_leading_axis(task_gradients, num_tasks)
        matrix = gramian(task_gradients)
        active = all_active(num_tasks) if active is None else active
        key, inputs = state.key, {}
        if key is not None:
            key, inputs["key"] = jax.random.split(key)
        if memory is not None:
            inputs["memory"] = state.memory
        if needs_losses:
            inputs["losses"] = check_losses(losses, num_tasks).astype(matrix.dtype)
        values = weights(matrix, active, **inputs)
        values, carried = values if memory is not None else (values, None)
        # The state's dtypes must not change between steps, or jit would compile again.
        new_state = AggregatorState(
            values.astype(state.weights.dtype), key, like(carried, state.memory)
        )
        return weighted_sum(task_gradients, values), new_state

    return make_aggregator(init, update)


def from_rows(
    combine: Callable[..., Any],
    num_tasks: int,
    *,
    seed: int | None = None,
    memory: Callable[[optax.Params], PyTree] | None = None,
    needs_losses: bool = False,
) -> Aggregator:
    """Make an aggregator of a function that needs the task gradients themselves.

    Args:
        combine: Pure function `(task_gradients, active) -> gradient`, from leaves
            `[tasks, *shape]` to leaves `[*shape]`.
        num_tasks: Length of the leading axis of every gradient.
        seed: Seed of the key kept in the state; `combine` then takes a fresh `key`
            every step. None for a deterministic method.
        memory: Makes what the method carries from step to step, given the parameters;
            `combine` then takes it as `memory` and returns `(gradient, memory)`. Past
            gradients are kept here as leaves `[num_tasks, *shape]`. None for a
            stateless method.
        needs_losses: Whether `combine` takes `losses`, `[tasks]`.

    Returns:
        An `optax` aggregator as that of `from_weights`, whose state is a `RowState`.

    Raises:
        ValueError: As `from_weights`.
    """
    check_num_tasks(num_tasks)

    def init(params: optax.Params) -> RowState:
        return RowState(
            key=None if seed is None else jax.random.key(seed),
            memory=None if memory is None else memory(params),
        )

    def update(
        task_gradients: PyTree,
        state: RowState,
        params: optax.Params | None = None,
        *,
        losses: Float[Array, " tasks"] | None = None,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, RowState]:
        del params, extra
        check_leading_axis(task_gradients, num_tasks)
        active = all_active(num_tasks) if active is None else active
        key, inputs = state.key, {}
        if key is not None:
            key, inputs["key"] = jax.random.split(key)
        if memory is not None:
            inputs["memory"] = state.memory
        if needs_losses:
            inputs["losses"] = check_losses(losses, num_tasks)
        gradient = combine(task_gradients, active, **inputs)
        gradient, carried = gradient if memory is not None else (gradient, None)
        return gradient, RowState(key, like(carried, state.memory))

    return make_aggregator(init, update)


def chain_after(
    aggregator: Aggregator, transformation: optax.GradientTransformation
) -> Aggregator:
    """Aggregate task gradients, then transform the one gradient that results.

    Clipping, momentum and the like belong after the aggregator: before it, they would
    act on the stacked gradients of all tasks as if these were one gradient. Clipping
    by global norm, for one, would shrink every task by the norm of the whole stack, and
    clipping by value would bend the angles the aggregator reasons about.

    Args:
        aggregator: Takes leaves `[tasks, *shape]`, returns leaves `[*shape]`.
        transformation: Any Optax transformation of the aggregated gradient.

    Returns:
        An aggregator whose state is `(aggregator_state, transformation_state)`. Its
        update hands `losses` and `active` to the aggregator alone, and any other
        keyword to both.

    Raises:
        TypeError: If `aggregator` is no aggregator, or `transformation` is one: the
            order is wrong.
    """
    if not isinstance(aggregator, Aggregator) or isinstance(transformation, Aggregator):
        raise TypeError(
            "chain_after takes an aggregator, then a transformation of the one "
            "gradient that it returns. A transformation put first, such as clipping, "
            "would act on the stacked gradients of all tasks as if they were one."
        )
    transformation = optax.with_extra_args_support(transformation)

    def init(params: optax.Params) -> tuple[Any, optax.OptState]:
        return aggregator.init(params), transformation.init(params)

    def update(
        task_gradients: PyTree,
        state: tuple[Any, optax.OptState],
        params: optax.Params | None = None,
        *,
        losses: Float[Array, " tasks"] | None = None,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, tuple[Any, optax.OptState]]:
        aggregator_state, transformation_state = state
        gradient, aggregator_state = aggregator.update(
            task_gradients,
            aggregator_state,
            params,
            losses=losses,
            active=active,
            **extra,
        )
        updates, transformation_state = transformation.update(
            gradient, transformation_state, params, **extra
        )
        return updates, (aggregator_state, transformation_state)

    return make_aggregator(init, update)


def check_num_tasks(num_tasks: int) -> None:
    """Raise ValueError unless there is at least one task."""
    if num_tasks < 1:
        raise ValueError(f"num_tasks is {num_tasks}; pass 1 or more.")


def check_leading_axis(
    task_gradients: PyTree, num_tasks: int, name: str = "task_gradients"
) -> None:
    """Raise ValueError unless every leaf has one gradient a task."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(task_gradients):
        if leaf.shape[:1] != (num_tasks,):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {leaf.shape}, "
                f"but num_tasks is {num_tasks}; stack one gradient a task along the "
                "leading axis."
            )


def check_losses(
    losses: Float[Array, " tasks"] | None, num_tasks: int
) -> Float[Array, " tasks"]:
    """Give the losses back as constants; raise ValueError where they are missing."""
    if losses is None or jnp.shape(losses) != (num_tasks,):
        raise ValueError(
            f"losses is {None if losses is None else jnp.shape(losses)}; this method "
            f"needs the losses of its {num_tasks} tasks, losses=[num_tasks]."
        )
    return jax.lax.stop_gradient(losses)


def all_active(num_tasks: int) -> Bool[Array, " tasks"]:
    """The mask of tasks that are all present."""
    return jnp.ones(num_tasks, bool)


def like(tree: PyTree, example: PyTree) -> PyTree:
    """Give a tree the dtypes of another of the same structure."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, example)


def make_aggregator(init: Callable[..., Any], update: Callable[..., Any]) -> Aggregator:
    """Pair the functions of an aggregator.

    Optax calls the first argument of `update` `updates`; here it is `task_gradients`.
    """
    return Aggregator(init, update)


def _leaf_products(first: Array, second: Array) -> Float[Array, "tasks tasks"]:
    axes = tuple(range(1, first.ndim))
    # The default precision multiplies in bfloat16 on a TPU and in TF32 on some GPUs.
    return jax.lax.dot_general(
        first,
        second,
        dimension_numbers=((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(first),
    )
