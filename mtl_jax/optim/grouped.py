"""Aggregate parts of the parameters apart: by layer, by matrix, the trunk alone."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from mtl_jax.optim.aggregator import (
    Aggregator,
    accumulation_dtype,
    all_active,
    make_aggregator,
    weighted_sum,
)

_SHOWN_PATHS = 5


def grouped(
    make_aggregator: Callable[[int], Aggregator], num_tasks: int, pattern: str
) -> Aggregator:
    r"""Aggregate each group of parameters by itself; sum the rest.

    A leaf's path is written `trunk/block_1/mlp/kernel`. The pattern is searched in it:
    all leaves in which the parts in parentheses match the same text are one group, with
    a Gramian, weights and a state of its own. Leaves in which the pattern is not found
    are added up over the active tasks.

        r"(block_\d+)/"     one group a block, as GradVac's by layer
        r"(.+)"             one group a leaf, by matrix
        r"^trunk/"          one group in all: the shared parameters only

    The method keeps its promises group by group: a direction that conflicts with no
    task in any group conflicts with none on all groups together, and tasks that agree
    over all may still conflict in one group. Zero, opposite and duplicate gradients are
    those of a group. Cost: the Gramians of the groups, together that of the whole, and
    one small solver a group, each compiled by itself.

    Args:
        make_aggregator: Called with `num_tasks`. The aggregator serves all groups, each
            with its own state; where there are several, keys in the states are made
            unlike by folding in the position of the group's name among all sorted.
        num_tasks: Length of the leading axis of every gradient.
        pattern: Regular expression, as of `re.search`.

    Returns:
        An aggregator whose state is a dictionary from a group's name, the texts joined
        by commas (`matched` if they are empty), to its state. `update` passes keyword
        arguments on; those with the structure of `task_gradients`, such as the
        gradients of a second batch, are split like it, and so are `params`.

    Raises:
        ValueError: From `init`, if the pattern is found in no path, or, from `update`,
            if the gradients have other groups than the parameters that `init` was
            given.

    References:
        Wang et al., Gradient Vaccine: Investigating and Improving Multi-task
        Optimization in Massively Multilingual Models, ICLR 2021,
        https://arxiv.org/abs/2010.05874.
    """
    expression = re.compile(pattern)

    def group_of(path: str) -> str | None:
        match = expression.search(path)
        if match is None:
            return None
        texts = match.groups(default="")
        return ",".join(texts) if any(texts) else "matched"

    return _split(make_aggregator(num_tasks), group_of, f"pattern {pattern!r} matches")


def where(predicate: Callable[[str], bool], aggregator: Aggregator) -> Aggregator:
    """Aggregate some of the parameters; sum the rest.

    Leaves for which the predicate is true go through the aggregator together, as if
    there were no others; the others are added up over the active tasks. Cost: at most
    that of the aggregator.

    Args:
        predicate: Takes a leaf's path, such as `trunk/block_1/mlp/kernel`.
        aggregator: Takes the leaves chosen.

    Returns:
        An aggregator whose state is a dictionary with the aggregator's state as
        `matched`; see `grouped`.

    Raises:
        ValueError: As `grouped`.
    """
    return _split(
        aggregator,
        lambda path: "matched" if predicate(path) else None,
        "the predicate chooses",
    )


def count_tasks(task_gradients: PyTree) -> int:
    """Length of the leading axis; raise ValueError where the leaves do not share it."""
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(task_gradients)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"the leaves of task_gradients have leading axes {sorted(lengths)}; stack "
            "one gradient a task along the leading axis of every leaf."
        )
    [(num_tasks,)] = lengths
    return num_tasks


def _split(
    aggregator: Aggregator, group_of: Callable[[str], str | None], chooses: str
) -> Aggregator:
    """Hand each group of leaves to an aggregator; sum the leaves without a group."""

    def group_by_leaf(tree: PyTree) -> list[str | None]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
        ]
        groups = [group_of(path) for path in paths]
        if not _names(groups):
            raise ValueError(
                f"{chooses} none of the {len(paths)} parameters; their paths are like "
                f"{paths[:_SHOWN_PATHS]}."
            )
        return groups

    def init(params: optax.Params) -> dict[str, Any]:
        groups = group_by_leaf(params)
        names = _names(groups)
        states = {name: aggregator.init(_part(params, groups, name)) for name in names}
        if len(names) == 1:
            return states
        return {name: _fold_in(states[name], i) for i, name in enumerate(names)}

    def update(
        task_gradients: PyTree,
        state: dict[str, Any],
        params: optax.Params | None = None,
        *,
        active: Bool[Array, " tasks"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, dict[str, Any]]:
        num_tasks = count_tasks(task_gradients)
        active = all_active(num_tasks) if active is None else active
        groups = group_by_leaf(task_gradients)
        if _names(groups) != sorted(state):
            raise ValueError(
                f"task_gradients has the groups {_names(groups)}, the state has "
                f"{sorted(state)}; give `init` the parameters of these gradients."
            )
        structure = jax.tree.structure(task_gradients)

        def part(tree: PyTree, group: str | None) -> PyTree:
            alike = jax.tree.structure(tree) == structure
            return _part(tree, groups, group) if alike else tree

        new_state = {}
        remaining = part(task_gradients, None)
        weights = active.astype(accumulation_dtype(remaining))
        gradients: dict[str | None, PyTree] = {None: weighted_sum(remaining, weights)}
        for name in state:
            gradients[name], new_state[name] = aggregator.update(
                part(task_gradients, name),
                state[name],
                part(params, name),
                active=active,
                **{key: part(value, name) for key, value in extra.items()},
            )
        # Every part has its leaves in the order of the whole.
        leaves = {name: iter(jax.tree.leaves(tree)) for name, tree in gradients.items()}
        gradient = structure.unflatten([next(leaves[group]) for group in groups])
        return gradient, new_state

    return make_aggregator(init, update)


def _names(groups: Sequence[str | None]) -> list[str]:
    return sorted({group for group in groups if group is not None})


def _part(tree: PyTree, groups: Sequence[str | None], group: str | None) -> PyTree:
    """The tree with None, which is no leaf, for the leaves of all other groups."""
    leaves, structure = jax.tree.flatten(tree)
    kept = [
        leaf if own == group else None for leaf, own in zip(leaves, groups, strict=True)
    ]
    return structure.unflatten(kept)


def _fold_in(state: PyTree, index: int) -> PyTree:
    """Make the keys in a state unlike those of other indices."""

    def fold(leaf: Array) -> Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, index) if is_key else leaf

    return jax.tree.map(fold, state)
