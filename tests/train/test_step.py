import math

import jax.numpy as jnp
import numpy as np

from mtl_jax.train.gradients import Evaluation
from mtl_jax.train.step import task_expert_information, task_metrics


def test_tasks_with_experts_of_their_own_say_all():
    load = jnp.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    np.testing.assert_allclose(task_expert_information(load), math.log(2), rtol=1e-6)


def test_tasks_that_use_experts_alike_say_nothing():
    load = jnp.array([[0.1, 0.9], [0.1, 0.9], [0.1, 0.9]])
    np.testing.assert_allclose(task_expert_information(load), 0.0, atol=1e-7)


def test_information_by_the_definition():
    # P = (1/2, 0; 1/4, 1/4) with marginals (1/2, 1/2) and (3/4, 1/4):
    # 1/2 log(1/2 / 3/8) + 1/4 log(1/4 / 3/8) + 1/4 log(1/4 / 1/8).
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    load = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    np.testing.assert_allclose(task_expert_information(load), expected, rtol=1e-6)


def statistics(load, dropped, entropy):
    dead = load.count(0.0) / len(load)
    return {
        "load": jnp.array(load),
        "dropped": jnp.array(dropped),
        "dead": jnp.array(dead),
        "entropy": jnp.array(entropy),
    }


def evaluation(by_task):
    tasks = len(by_task)
    return Evaluation(
        losses=jnp.ones(tasks),
        auxiliary_loss=jnp.zeros(()),
        active=jnp.ones(tasks, bool),
        gramian=jnp.eye(tasks),
        aggregator_state=(),
        statistics=by_task,
        collections={},
        faulty=jnp.zeros(tasks, bool),
    )


def test_routers_are_told_of_by_task_and_layer_and_as_the_mean_over_layers():
    found = task_metrics(
        evaluation(
            {
                "depth": {
                    "block_1": statistics([1.0, 0.0, 0.0, 0.0], 0.5, 0.25),
                    "block_2_attention": statistics([0.5, 0.25, 0.25, 0.0], 0.0, 1.25),
                },
                "edges": {
                    "block_1": statistics([0.25, 0.25, 0.25, 0.25], 0.125, 1.0),
                    "block_2_attention": statistics([0.5, 0.5, 0.0, 0.0], 0.25, 0.5),
                },
            }
        ),
        ("depth", "edges"),
    )
    expected = {
        "depth/dropped_tokens/block_1": 0.5,
        "depth/dropped_tokens/block_2_attention": 0.0,
        "depth/dropped_tokens": 0.25,
        "depth/dead_experts/block_1": 0.75,
        "depth/dead_experts/block_2_attention": 0.25,
        "depth/dead_experts": 0.5,
        "depth/gate_entropy/block_1": 0.25,
        "depth/gate_entropy/block_2_attention": 1.25,
        "depth/gate_entropy": 0.75,
        "edges/dropped_tokens/block_1": 0.125,
        "edges/dropped_tokens/block_2_attention": 0.25,
        "edges/dropped_tokens": 0.1875,
        "edges/dead_experts/block_1": 0.0,
        "edges/dead_experts/block_2_attention": 0.5,
        "edges/dead_experts": 0.25,
        "edges/gate_entropy/block_1": 1.0,
        "edges/gate_entropy/block_2_attention": 0.5,
        "edges/gate_entropy": 0.75,
        # The experts that neither task goes to.
        "all/dead_experts/block_1": 0.0,
        "all/dead_experts/block_2_attention": 0.25,
    }
    kinds = ("dropped_tokens", "dead_experts", "gate_entropy")
    told = {name for name in found if name.split("/")[1] in kinds}
    assert told == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value)
    np.testing.assert_array_equal(
        found["edges/expert_load/block_2_attention"], [0.5, 0.5, 0.0, 0.0]
    )
