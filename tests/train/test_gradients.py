import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import experiment

from mtl_jax import optim
from mtl_jax.data import training_batches
from mtl_jax.layers.moe.routers import LossFree
from mtl_jax.models.multitask import repeat
from mtl_jax.train import build_program
from mtl_jax.train.gradients import at_features, at_params, balanced

KEY = jax.random.key(3)


@functools.cache
def setup(**fields):
    chosen = experiment(**fields)
    program = build_program(chosen, jax.devices()[:1])
    state = program.init_state()
    batch = next(
        training_batches(
            chosen.mixture,
            {task.name: task.field for task in chosen.tasks},
            0,
            program.share_multiple,
        )
    )
    # Heads start at zero and would pass no gradient on.
    heads = jax.tree.map(
        lambda leaf: jnp.asarray(
            leaf + np.float32(0.1 * np.sin(np.arange(leaf.size))).reshape(leaf.shape)
        ),
        jax.device_get(state.params["heads"]),
    )
    params = {"trunk": state.params["trunk"], "heads": heads}
    return program.objective, params, program.place(batch)


def reference_losses(objective, params, batch):
    """Each task's loss written out: own forward pass, own mean over all its labels.

    Returns:
      Task name -> loss with the task's part of the auxiliary loss, and loss alone.
    """
    model, losses = objective.model, {}
    by_name = {task.name: task for task in objective.tasks}
    for index, (source, names) in enumerate(objective.labels.items()):
        passes = model.num_passes(names)
        output = model.apply_trunk(
            repeat(params["trunk"], passes),
            batch[source].inputs,
            names,
            train=True,
            key=jax.random.fold_in(KEY, index),
        )
        for j, name in enumerate(names):
            prediction = model.apply_head(
                params["heads"][name], output.features[j % passes], name
            )
            values, valid = by_name[name].loss(prediction, batch[source].targets[name])
            loss = jnp.sum(jnp.where(valid, values, 0.0)) / jnp.sum(valid)
            auxiliary = output.auxiliary_loss[j % passes] * passes / len(names)
            losses[name] = loss + auxiliary, loss
    return losses


@functools.cache
def reference_gradients(num_routers):
    """A function of two weights a task: of its loss, and of its auxiliary loss.

    Returns:
      The function, to the gradient of the weighted sum and to the losses.
    """
    objective, params, batch = setup(num_routers=num_routers)

    def weighted(params, weights, auxiliary_weights):
        losses = reference_losses(objective, params, batch)
        total, parts = 0.0, [losses[task.name] for task in objective.tasks]
        for k, (with_auxiliary, alone) in enumerate(parts):
            total += weights[k] * alone
            total += auxiliary_weights[k] * (with_auxiliary - alone)
        return total, jnp.stack([alone for _, alone in parts])

    return functools.partial(jax.jit(jax.grad(weighted, has_aux=True)), params)


WEIGHTED = optim.Aggregator(
    init=lambda params: jnp.ones(4),
    update=lambda gradients, weights, params=None, **_: (
        optim.weighted_sum(gradients, weights),
        weights,
    ),
)
"""An aggregator whose state is the weights it uses."""


def assert_trees_close(actual, expected, tolerance=2e-6):
    scale = max(float(optax.tree.norm(expected)), 1e-3)
    difference = optax.tree.norm(optax.tree.sub(actual, expected))
    assert float(difference) <= tolerance * scale


@pytest.mark.parametrize(
    "num_routers",
    [
        pytest.param(4, id="router a task"),
        pytest.param(None, id="shared", marks=pytest.mark.slow),
    ],
)
def test_each_row_is_the_gradient_of_that_tasks_loss(num_routers):
    objective, params, batch = setup(num_routers=num_routers)
    expected = reference_gradients(num_routers)
    evaluate = jax.jit(at_params(objective, WEIGHTED))
    rows = []
    for k, task in enumerate(objective.tasks):
        name, alone = task.name, jnp.eye(4)[k]
        gradient, losses = expected(alone, alone)
        evaluation, actual = evaluate(params, batch, KEY, alone)
        assert_trees_close(actual["trunk"], gradient["trunk"])
        assert_trees_close(actual["heads"][name], gradient["heads"][name])
        np.testing.assert_allclose(evaluation.losses[k], losses[k], rtol=1e-6)
        rows.append(jax.flatten_util.ravel_pytree(gradient["trunk"])[0])
    rows = np.stack(rows).astype(np.float64)
    gramian = rows @ rows.T
    np.testing.assert_allclose(
        evaluation.gramian, gramian, atol=3e-6 * np.max(np.abs(gramian))
    )


def test_sum_at_features_is_the_gradient_of_the_summed_loss():
    objective, params, batch = setup(num_routers=None)
    evaluation, gradient = jax.jit(at_features(objective, WEIGHTED))(
        params, batch, KEY, jnp.ones(4)
    )
    expected = jax.jit(jax.grad(objective.summed_loss))(params, batch, KEY)
    assert_trees_close(gradient, expected)
    # Tasks of different sources share no features.
    gramian = np.asarray(evaluation.gramian)
    assert np.all(gramian[:2, 2:] == 0)
    assert np.all(np.diag(gramian) > 0)


@pytest.mark.parametrize(
    "num_routers",
    [
        pytest.param(4, id="router a task"),
        pytest.param(None, id="shared", marks=pytest.mark.slow),
    ],
)
def test_balanced_losses_are_weighed_in_trunk_and_heads(num_routers):
    objective, params, batch = setup(num_routers=num_routers)
    weights = jnp.array([2.0, 0.5, 1.0, 3.0])
    balancer = optim.Balancer(
        init=lambda: (), weights=lambda losses, state, active: (weights, state)
    )
    # A router's auxiliary loss is weighed as its task is, that of a shared one is not.
    shares = weights if num_routers else jnp.ones(4)
    expected, _ = reference_gradients(num_routers)(weights, shares)
    state = optim.BalancerState(jnp.zeros(4), ())
    evaluation, gradient = jax.jit(balanced(objective, balancer))(
        params, batch, KEY, state
    )
    assert_trees_close(gradient, expected)
    np.testing.assert_array_equal(evaluation.aggregator_state.weights, weights)


def test_a_task_without_labels_is_inactive_and_has_no_gradient():
    objective, params, batch = setup(num_experts=0)
    examples = batch["stripes"]
    targets = {
        **examples.targets,
        "phase": jnp.full_like(examples.targets["phase"], -1),
    }
    batch = {
        **batch,
        "stripes": type(examples)(
            examples.inputs, targets, examples.mask, examples.index
        ),
    }
    aggregator = optim.mgda(num_tasks=4)
    evaluation, gradient = jax.jit(at_params(objective, aggregator))(
        params, batch, KEY, aggregator.init(params["trunk"])
    )
    assert evaluation.active.tolist() == [True, True, True, False]
    assert evaluation.losses[3] == 0
    assert optax.tree.norm(gradient["heads"]["phase"]) == 0
    assert optax.tree.norm(gradient["trunk"]) > 0


def test_features_need_a_shared_trunk():
    objective, _, _ = setup(num_routers=4)
    with pytest.raises(ValueError, match='gradients_at="params"'):
        at_features(objective, optim.sum(num_tasks=4))


@pytest.mark.slow
def test_the_loss_over_all_tasks_reaches_every_router():
    chosen = experiment(mutual_information_weight=2.0)
    objective, params, batch = setup(mutual_information_weight=2.0)
    evaluation, gradient = jax.jit(at_params(objective, WEIGHTED))(
        params, batch, KEY, jnp.ones(4)
    )
    value, expected = jax.jit(jax.value_and_grad(objective.summed_loss))(
        params, batch, KEY
    )
    np.testing.assert_allclose(
        jnp.sum(evaluation.losses) + evaluation.auxiliary_loss, value, rtol=1e-5
    )
    assert_trees_close(gradient["trunk"], expected["trunk"])
    plain, _, _ = setup()
    difference = value - jax.jit(plain.summed_loss)(params, batch, KEY)
    # By the definition, from the statistics of every pass of the two sources. Tiles
    # have as many tokens as stripes: both are of the same size.
    total = 0.0
    for block in evaluation.statistics["bright"]:
        gates = np.stack(
            [
                np.float64(evaluation.statistics[task.name][block]["gates"])
                * chosen.mixture.examples_per_batch(1)[source]
                for source, names in chosen.labels.items()
                for task in chosen.tasks
                if task.name in names
            ]
        )
        joint = gates / gates.sum()
        by_task, by_expert = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
        inside = joint / ((by_task + 1e-4) * (by_expert + 1e-4)) + 1e-4
        total -= np.sum(joint * np.log(inside))
    np.testing.assert_allclose(difference, 2.0 * total, rtol=2e-3)


@pytest.mark.slow
def test_what_every_pass_changes_in_a_collection_adds_up():
    chosen = experiment(num_routers=None)
    loss_free = functools.partial(chosen.trunk.moe, router=LossFree)
    trunk = chosen.trunk.clone(moe=loss_free)
    program = build_program(
        experiment(num_routers=None, trunk=trunk), jax.devices()[:1]
    )
    state = program.init_state()
    (block,) = state.collections["balance"]
    np.testing.assert_array_equal(
        state.collections["balance"][block]["moe"]["router"]["bias"], np.zeros(4)
    )
    batch = program.place(
        next(
            training_batches(
                program.experiment.mixture,
                {task.name: task.field for task in chosen.tasks},
                0,
                program.share_multiple,
            )
        )
    )
    stepped, _ = jax.jit(program.step)(state, batch)
    bias = stepped.collections["balance"][block]["moe"]["router"]["bias"]
    expected = np.zeros(4)
    for source in chosen.labels:
        _, sown = trunk.apply(
            {"params": state.params["trunk"], **state.collections},
            batch[source].inputs,
            mutable=["statistics"],
        )
        load = np.asarray(sown["statistics"][block]["moe"]["load"])
        expected += 1e-3 * np.sign(1 / 4 - load)
    assert np.any(expected)
    np.testing.assert_allclose(bias, expected, atol=1e-7)
