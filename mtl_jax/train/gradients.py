"""Task gradients: where they are taken, and how they become one update direction.

The functions here return a function ``(params, batch, key, aggregator_state,
collections) -> (evaluation, gradient)``. Trunk gradients go through the aggregator; a
head belongs to one task and keeps the plain gradient of its own loss. A router's
auxiliary losses are shared out evenly among the tasks of its forward pass.

A task whose loss, gradient where it is taken, or gradient of the head is not finite is
left out: for the aggregator it is absent, as a task without labels is, and its head
gets no gradient. A norm that overflows float32 counts as not finite.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree
from optax.experimental import aggregating

from mtl_jax.data.batch import Batch
from mtl_jax.models.multitask import repeat
from mtl_jax.optim import Balancer, from_balancer, gramian
from mtl_jax.train.objective import Objective, tokens_of_a_pass


class Evaluation(NamedTuple):
    """What a gradient evaluation learns besides the gradient.

    Attributes:
      losses: Loss of each task, finite or not.
      auxiliary_loss: Sum of the routers' auxiliary losses.
      active: Which tasks took part: those with a label in the batch that are not
        faulty.
      faulty: Which tasks with a label have a loss or gradient that is not finite.
      gramian: Inner products of the task gradients where they were taken; those of a
        faulty task mean nothing.
      statistics: Task name -> layer name -> router statistics of the task's pass on
        the last source that labels it.
      aggregator_state: The aggregator's state after the evaluation.
      collections: What the trunk keeps besides its parameters, after all passes: as
        it was, plus the sum of what each pass made of that.
    """

    losses: Float[Array, " tasks"]
    auxiliary_loss: Float[Array, ""]
    active: Bool[Array, " tasks"]
    faulty: Bool[Array, " tasks"]
    gramian: Float[Array, "tasks tasks"]
    statistics: Mapping[str, Mapping[str, Any]]
    aggregator_state: Any
    collections: Mapping[str, Any]


EMPTY: Mapping[str, Any] = {}
"""No collections: the trunk has its parameters alone."""

GradientFunction = Callable[
    [Mapping, Batch, Key[Array, ""], Any, Mapping], tuple[Evaluation, Mapping]
]


class _SourceGradients(NamedTuple):
    """Gradients with respect to the features of one source's examples.

    Attributes:
      tasks: Names of the tasks that the source labels.
      features: Gradient of each task's loss, in the order of ``tasks``.
      auxiliary_loss: Routers' auxiliary losses by pass.
      statistics: Router statistics by pass.
      collections: The trunk's collections as each pass leaves them.
      gates: Mean gates by layer and pass that the joint loss depends on.
      num_tokens: Tokens of a pass.
      finite: Whether all features are.
      pull_back: From cotangents of features, auxiliary loss and gates by pass to
        gradients with respect to the trunk's parameters by pass.
    """

    tasks: tuple[str, ...]
    features: Float[Array, "labelled batch rows columns width"]
    auxiliary_loss: Float[Array, " passes"]
    statistics: Mapping[str, Any]
    collections: Mapping[str, Any]
    gates: Mapping[str, Array]
    num_tokens: int
    finite: Bool[Array, ""]
    pull_back: Callable[[Array, Array, Mapping[str, Array]], PyTree]


def at_params(
    objective: Objective, aggregator: aggregating.Aggregator
) -> GradientFunction:
    """Takes task gradients at the trunk's parameters: exact.

    Costs one backward pass of the trunk for each task and source that labels it; in
    a task-conditioned trunk, where every task has its own forward pass, that is no
    more than a plain sum costs.

    Args:
      objective: The task losses.
      aggregator: Turns gradients stacked by task into one.

    Returns:
      The gradient function.
    """
    names = [task.name for task in objective.tasks]

    def evaluate(params, batch, key, aggregator_state, collections=EMPTY):
        counts = objective.label_counts(batch)
        losses, head_gradients, sources = _differentiate_heads(
            objective, params, batch, key, counts, collections
        )
        joint_loss, gate_gradients = _differentiate_joint_loss(objective, sources)
        rows: dict[str, PyTree] = {}
        for name, source in sources.items():
            pulled = _pull_back_by_task(source, gate_gradients[name])
            for j, name in enumerate(source.tasks):
                row = jax.tree.map(lambda leaf, j=j: leaf[j], pulled)
                rows[name] = optax.tree.add(rows[name], row) if name in rows else row
        task_gradients = jax.tree.map(
            lambda *leaves: jnp.stack([_without_nan(leaf) for leaf in leaves]),
            *(rows[name] for name in names),
        )
        verdict = _judge(losses, head_gradients, task_gradients, counts)
        trunk_gradient, aggregator_state = aggregator.update(
            task_gradients,
            aggregator_state,
            params["trunk"],
            losses=jnp.where(verdict.active, losses, 0.0),
            active=verdict.active,
        )
        return (
            _evaluation(
                losses, joint_loss, sources, verdict, aggregator_state, collections
            ),
            {"trunk": trunk_gradient, "heads": verdict.heads},
        )

    return evaluate


def at_features(
    objective: Objective, aggregator: aggregating.Aggregator
) -> GradientFunction:
    """Takes task gradients at the trunk's features: as cheap as a plain sum.

    The aggregator combines the gradients with respect to the features of all sources
    (of which tasks labelled by different sources share none), and one backward pass
    takes the result through the trunk: MGDA-UB's upper bound (Sener & Koltun, 2018)
    for any aggregator.

    Args:
      objective: The task losses; its trunk must be shared by the tasks.
      aggregator: Turns gradients stacked by task into one.

    Returns:
      The gradient function.

    Raises:
      ValueError: If the trunk is task-conditioned: its tasks have no features in
        common.
    """
    if objective.model.task_conditioned:
        raise ValueError(
            'gradients_at is "features", but the trunk has a router a task and so no '
            'features that tasks share; use gradients_at="params", which costs this '
            "trunk no more"
        )
    names = [task.name for task in objective.tasks]

    def evaluate(params, batch, key, aggregator_state, collections=EMPTY):
        counts = objective.label_counts(batch)
        losses, head_gradients, sources = _differentiate_heads(
            objective, params, batch, key, counts, collections
        )
        joint_loss, gate_gradients = _differentiate_joint_loss(objective, sources)
        task_gradients = {
            name: _spread(source, names) for name, source in sources.items()
        }
        verdict = _judge(losses, head_gradients, task_gradients, counts)
        combined: Any
        combined, aggregator_state = aggregator.update(
            task_gradients,
            aggregator_state,
            losses=jnp.where(verdict.active, losses, 0.0),
            active=verdict.active,
        )
        pulled = [
            _if_finite(
                source,
                source.pull_back(
                    combined[name][None], jnp.ones(1, jnp.float32), gate_gradients[name]
                ),
            )
            for name, source in sources.items()
        ]
        trunk_gradient = jax.tree.map(
            lambda *leaves: functools.reduce(jnp.add, leaves)[0], *pulled
        )
        return (
            _evaluation(
                losses, joint_loss, sources, verdict, aggregator_state, collections
            ),
            {"trunk": trunk_gradient, "heads": verdict.heads},
        )

    return evaluate


def balanced(objective: Objective, balancer: Balancer) -> GradientFunction:
    """Weighs the losses before they are differentiated: the cost of a plain sum.

    Trunk and heads get the gradient of ``sum_k w_k L_k``. Auxiliary losses of a shared
    trunk are added as they are; those of a pass that one task has to itself weigh as
    much as the task. The Gramian that is logged is the one at hand: at the features of
    a shared trunk, and at the parameters where every task has its own pass.

    Args:
      objective: The task losses.
      balancer: Weighs them.

    Returns:
      The gradient function, whose aggregator state is a `BalancerState`.
    """
    take = at_params if objective.model.task_conditioned else at_features
    unweighted = take(objective, from_balancer(balancer, len(objective.tasks)))

    def evaluate(params, batch, key, aggregator_state, collections=EMPTY):
        evaluation, gradient = unweighted(
            params, batch, key, aggregator_state, collections
        )
        heads = {}
        for k, task in enumerate(objective.tasks):
            weight = evaluation.aggregator_state.weights[k]
            heads[task.name] = jax.tree.map(
                lambda leaf, weight=weight: weight.astype(leaf.dtype) * leaf,
                gradient["heads"][task.name],
            )
        return evaluation, {"trunk": gradient["trunk"], "heads": heads}

    return evaluate


def _differentiate_heads(
    objective: Objective,
    params: Mapping,
    batch: Batch,
    key: Array,
    counts: Array,
    collections: Mapping,
) -> tuple[Array, Mapping, dict[str, _SourceGradients]]:
    """Runs every forward pass, and every head forward and backward.

    Returns:
      Task losses, head gradients by task, and feature gradients by source.
    """
    model = objective.model
    by_name = {task.name: (k, task) for k, task in enumerate(objective.tasks)}
    losses = [jnp.float32(0.0)] * len(objective.tasks)
    head_gradients: dict[str, PyTree] = {}
    sources = {}
    for i, (source, names) in enumerate(objective.labels.items()):
        examples, passes = batch[source], model.num_passes(names)

        def trunk(trunk_params, i=i, names=names, examples=examples):
            output = model.apply_trunk(
                trunk_params,
                examples.inputs,
                names,
                train=True,
                key=jax.random.fold_in(key, i),
                collections=collections,
            )
            gates = objective.joint_gates(output)
            return (output.features, output.auxiliary_loss, gates), output

        (features, auxiliary, gates), pull_back, output = jax.vjp(
            trunk, repeat(params["trunk"], passes), has_aux=True
        )
        feature_gradients = []
        for j, name in enumerate(names):
            k, task = by_name[name]
            loss, (head_gradient, feature_gradient) = jax.value_and_grad(
                objective.task_loss, argnums=(0, 1)
            )(params["heads"][name], features[j % passes], examples, task, counts[k])
            losses[k] += loss
            feature_gradients.append(feature_gradient)
            if name in head_gradients:
                head_gradient = optax.tree.add(head_gradients[name], head_gradient)
            head_gradients[name] = head_gradient
        sources[source] = _SourceGradients(
            names,
            jnp.stack(feature_gradients),
            auxiliary,
            output.statistics,
            output.collections,
            gates,
            tokens_of_a_pass(output),
            jnp.all(jnp.isfinite(features)),
            lambda *cotangents, pull_back=pull_back: pull_back(cotangents)[0],
        )
    heads = {task.name: head_gradients[task.name] for task in objective.tasks}
    return jnp.stack(losses), heads, sources


def _differentiate_joint_loss(
    objective: Objective, sources: Mapping[str, _SourceGradients]
) -> tuple[Array, Mapping[str, Mapping[str, Array]]]:
    """The loss that spans all tasks, and its gradients at the gates by source."""
    return jax.value_and_grad(objective.joint_loss)(
        {name: source.gates for name, source in sources.items()},
        {name: source.num_tokens for name, source in sources.items()},
    )


def _pull_back_by_task(
    source: _SourceGradients, gate_gradients: Mapping[str, Array]
) -> PyTree:
    """Gradients of one source's tasks with respect to the trunk's parameters.

    One after another and not by `jax.vmap`, which XLA for CPU of jaxlib 0.10.2
    computes wrongly.
    """
    tasks, passes = len(source.tasks), len(source.auxiliary_loss)
    if passes == tasks:
        return source.pull_back(
            source.features, jnp.ones(tasks, jnp.float32), gate_gradients
        )
    share = jnp.full(1, 1.0 / tasks, jnp.float32)
    return jax.lax.map(
        lambda gradient: jax.tree.map(
            lambda leaf: leaf[0],
            source.pull_back(
                gradient[None],
                share,
                jax.tree.map(lambda gates: gates / tasks, gate_gradients),
            ),
        ),
        source.features,
    )


def _spread(
    source: _SourceGradients, names: Sequence[str]
) -> Float[Array, "tasks batch rows columns width"]:
    """Feature gradients by task, zero for tasks that the source does not label."""
    absent = jnp.zeros_like(source.features[0])
    by_task = dict(zip(source.tasks, source.features, strict=True))
    return jnp.stack([_without_nan(by_task.get(name, absent)) for name in names])


def _without_nan(leaf: Array) -> Array:
    """Puts the largest number in place of every entry that is not finite.

    The row's norm is infinite still, so that its Gramian tells, which is computed
    anyway; but a weight of 0 takes it out of any sum, as it would not take out NaN.
    """
    return jnp.where(jnp.isfinite(leaf), leaf, jnp.finfo(leaf.dtype).max)


def _if_finite(source: _SourceGradients, pulled: PyTree) -> PyTree:
    """The gradient, or zeros where the source's features were not finite.

    All its tasks are left out then, and yet NaN comes of their zero cotangents.
    """
    return jax.tree.map(lambda leaf: jnp.where(source.finite, leaf, 0), pulled)


class _Verdict(NamedTuple):
    """Which tasks take part, and what is left of the others.

    Attributes:
      active: Those with a label that are not faulty.
      faulty: Those with a label whose loss or gradient is not finite.
      gramian: Inner products of the task gradients.
      heads: Gradients of the heads by task, zero where a task does not take part.
    """

    active: Bool[Array, " tasks"]
    faulty: Bool[Array, " tasks"]
    gramian: Float[Array, "tasks tasks"]
    heads: Mapping[str, PyTree]


def _judge(
    losses: Float[Array, " tasks"],
    heads: Mapping[str, PyTree],
    task_gradients: PyTree,
    counts: Float[Array, " tasks"],
) -> _Verdict:
    matrix = gramian(task_gradients)
    norms = jnp.stack([optax.tree.norm(head, squared=True) for head in heads.values()])
    sound = (
        jnp.isfinite(losses) & jnp.isfinite(norms) & jnp.isfinite(jnp.diagonal(matrix))
    )
    active = (counts > 0) & sound
    return _Verdict(
        active,
        (counts > 0) & ~sound,
        matrix,
        {
            name: jax.tree.map(lambda leaf, k=k: jnp.where(active[k], leaf, 0), head)
            for k, (name, head) in enumerate(heads.items())
        },
    )


def _evaluation(
    losses: Array,
    joint_loss: Array,
    sources: Mapping[str, _SourceGradients],
    verdict: _Verdict,
    aggregator_state: optax.OptState,
    collections: Mapping,
) -> Evaluation:
    statistics: dict[str, Mapping] = {}
    auxiliary_loss = joint_loss
    moved = collections
    for source in sources.values():
        # Every pass began with the same; what each of them changed adds up. For
        # LossFree that is a sign for each source, not the sign of all counts together.
        moved = jax.tree.map(
            lambda now, before, after: now + jnp.sum(after - before[None], axis=0),
            moved,
            collections,
            {name: source.collections[name] for name in collections},
        )
        auxiliary_loss += jnp.sum(source.auxiliary_loss)
        passes = len(source.auxiliary_loss)
        for j, name in enumerate(source.tasks):
            statistics[name] = jax.tree.map(
                lambda leaf, j=j, passes=passes: leaf[j % passes], source.statistics
            )
    return Evaluation(
        losses,
        auxiliary_loss,
        verdict.active,
        verdict.faulty,
        verdict.gramian,
        statistics,
        aggregator_state,
        moved,
    )
