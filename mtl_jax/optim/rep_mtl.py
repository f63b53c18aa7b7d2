"""Rep-MTL: regularise what each task's loss asks of the features that tasks share."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.optim.aggregator import accumulation_dtype
from mtl_jax.optim.task_gradients import TaskLosses, check_heads

Saliencies = Float[Array, "tasks batch *space channels"]


def task_saliency_entropy(
    saliencies: Saliencies, active: Bool[Array, " tasks"] | None = None
) -> Float[Array, ""]:
    """How evenly tasks share the positions of the features, `L_tsr`.

    With `a_t = |mean over channels of S_t|` at every position of every example and
    `p_t = a_t / sum_k a_k`, the mean over examples and positions of

        -sum_t p_t log p_t.

    Between 0 (every position matters to one task alone) and `log tasks` (to all
    alike). A position that matters to no task counts 0. The same at any scale of all
    saliencies together.

    Args:
        saliencies: `S_t`, gradients of the task losses in the features.
        active: Which tasks are present; all by default.

    Returns:
        The entropy, float32 (float64 for float64 saliencies).
    """
    saliencies = _keep_active(saliencies, active)
    strength = jnp.abs(jnp.mean(saliencies, axis=-1))
    total = jnp.sum(strength, axis=0)
    share = strength / jnp.where(total > 0, total, 1)[None]
    # Where a share is 0 so is p log p, but neither its logarithm nor its slope exists.
    terms = jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0)
    return -jnp.mean(jnp.sum(terms, axis=0))


def cross_task_alignment(
    saliencies: Saliencies,
    temperature: float,
    active: Bool[Array, " tasks"] | None = None,
) -> Float[Array, ""]:
    """How little the tasks agree on the channels that matter to an example, `L_csa`.

    For each example `b`, `M_bt = S_bt S_btᵀ` holds the inner products over positions of
    every pair of channels for task `t`, and `N_b = A_b A_bᵀ` those over tasks, with
    `A_b` the spatial mean of the saliencies, `[channels, tasks]`. With cosines between
    such matrices taken as vectors,

        -cos(N_b, M_bt) / temperature + log sum_{k ≠ b} exp(cos(N_b, N_k) / temperature)

    averaged over examples and active tasks: a contrastive loss that pulls each task to
    its example's anchor `N_b` and pushes the anchors of different examples apart. The
    positive pair is not in the sum, so that the loss can be negative.

    A cosine with a zero matrix is 0. The same at any scale of all saliencies together.
    The cosines come from inner products of the saliencies themselves,
    `<S Sᵀ, A Aᵀ> = |Sᵀ A|²`: the largest array beside them is one square matrix an
    example and task, on channels or positions, whichever are fewer.

    Args:
        saliencies: `S_t`, gradients of the task losses in the features, of two examples
            or more.
        temperature: Divides the cosines.
        active: Which tasks are present; all by default.

    Returns:
        The loss, float32 (float64 for float64 saliencies); 0 where no task is active.

    Raises:
        ValueError: If there are fewer than two examples, or `temperature` is not
            positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; pass a positive one.")
    num_tasks, batch = saliencies.shape[:2]
    if batch < 2:
        raise ValueError(
            f"saliencies has {batch} example; tasks are aligned against other examples "
            "of the batch, so pass two or more."
        )
    flat = saliencies.reshape(num_tasks, batch, -1, saliencies.shape[-1])
    flat = _keep_active(flat, active)
    anchors = _unit_size(jnp.mean(flat, axis=2), axes=(0, 2))
    flat = _unit_size(flat, axes=(2, 3))

    # Task axes t and s, examples b and k, positions p, channels c.
    overlaps = _squared_norm("tbpc,sbc->tbps", flat, anchors, axes=(2, 3))
    lengths = _root(jax.lax.map(jax.checkpoint(_squared_self_overlap), flat))
    crossings = _squared_norm("tbc,skc->bkts", anchors, anchors, axes=(2, 3))
    anchor_lengths = _root(jnp.diagonal(crossings))

    positives = overlaps / lengths / anchor_lengths[None, :]
    negatives = crossings / anchor_lengths[:, None] / anchor_lengths[None, :]
    others = ~jnp.eye(batch, dtype=bool)
    repulsion = jax.nn.logsumexp(negatives / temperature, axis=1, where=others)
    terms = repulsion[None, :] - positives / temperature
    if active is None:
        return jnp.mean(terms)
    count = jnp.maximum(jnp.sum(active), 1).astype(terms.dtype)
    return jnp.sum(jnp.where(active[:, None], terms, 0)) / (count * batch)


def rep_mtl_regularizer(
    task_losses: TaskLosses,
    heads: Mapping[str, PyTree],
    features: Float[Array, "batch *space channels"],
    *args: PyTree,
    entropy_weight: float = 1.0,
    alignment_weight: float = 1.0,
    temperature: float = 1.0,
    active: Bool[Array, " tasks"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, " tasks"]]:
    """Saliency entropy and cross-task alignment of a model, and its task losses.

    `entropy_weight * task_saliency_entropy(S) + alignment_weight *
    cross_task_alignment(S, temperature)` with `S_t = dL_t / d features`. The saliencies
    are taken inside, so that `jax.grad` of the result, in trunk and heads, contains the
    second derivatives of the heads. The objective to minimise is a sum of task losses
    plus this; the authors use the sum of their logarithms.

    A task whose gradient in the features is zero adds no entropy, and agrees with no
    anchor. Cost: the heads are differentiated twice; one pass of the trunk.

    Args:
        task_losses: Task name -> `loss(features, head, *args)`, a scalar; their order
            is that of the tasks. With logarithms of losses here, the saliencies of
            tasks weigh alike whatever the size of their losses.
        heads: Task name -> the parameters that only this task has.
        features: What the trunk computes.
        *args: What the losses take besides, such as a batch.
        entropy_weight: Weight of the entropy. The authors search 0.7 to 1.5.
        alignment_weight: Weight of the alignment. The authors search 0.7 to 1.5.
        temperature: Divides the cosines of the alignment. The authors state no value.
        active: Which tasks are present; all by default.

    Returns:
        `(regularizer, losses)`, the losses as `[tasks]`.

    Raises:
        ValueError: If `heads` and `task_losses` do not name the same tasks, if there
            are fewer than two examples, or if `temperature` is not positive.

    References:
        Wang, Li and Xu, Rep-MTL: Unleashing the Power of Representation-level Task
        Saliency for Multi-Task Learning, ICCV 2025, https://arxiv.org/abs/2507.21049.
    """
    check_heads(task_losses, heads)
    pairs = [
        jax.value_and_grad(loss)(features, heads[name], *args)
        for name, loss in task_losses.items()
    ]
    losses, saliencies = (jnp.stack(values) for values in zip(*pairs, strict=True))
    entropy = task_saliency_entropy(saliencies, active)
    alignment = cross_task_alignment(saliencies, temperature, active)
    return entropy_weight * entropy + alignment_weight * alignment, losses


def _keep_active(saliencies: Array, active: Array | None) -> Array:
    """Widen, and make the saliencies of inactive tasks zero."""
    saliencies = saliencies.astype(accumulation_dtype(saliencies))
    if active is None:
        return saliencies
    return jnp.where(
        active.reshape((-1,) + (1,) * (saliencies.ndim - 1)), saliencies, 0
    )


def _unit_size(array: Array, axes: tuple[int, ...]) -> Array:
    """Divide by the largest size along some axes; what follows must not depend on it.

    Fourth powers of saliencies, which shrink with the size of the batch, would
    underflow. As the scale does not matter it can count as a constant.
    """
    largest = jnp.max(jnp.abs(array), axis=axes, keepdims=True)
    return array / jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))


def _squared_norm(
    products: str, left: Array, right: Array, axes: tuple[int, ...]
) -> Array:
    product = jnp.einsum(products, left, right, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(product**2, axis=axes)


def _squared_self_overlap(
    saliency: Float[Array, "batch positions channels"],
) -> Float[Array, " batch"]:
    """Squared Frobenius norm of `S Sᵀ`, which is that of `Sᵀ S`."""
    _, positions, channels = saliency.shape
    products = "bpc,bpd->bcd" if channels <= positions else "bpc,bqc->bpq"
    return _squared_norm(products, saliency, saliency, axes=(1, 2))


def _root(squares: Array) -> Array:
    """Square root, 1 (of no slope) where it would be 0, to divide by."""
    return jnp.sqrt(jnp.where(squares > 0, squares, 1))
