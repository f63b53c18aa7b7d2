import math

import jax.numpy as jnp
import numpy as np

from mtl_jax.train.step import task_expert_information


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
