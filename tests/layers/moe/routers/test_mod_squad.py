import math

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.layers.moe.losses import mutual_information
from mtl_jax.layers.moe.routers import ModSquad
from mtl_jax.layers.moe.routers.mod_squad import mod_squad


def test_gates_by_hand():
    # Softmax of log (4, 3, 2, 1) is (0.4, 0.3, 0.2, 0.1).
    logits = jnp.log(jnp.array([[[3.0, 2.0, 4.0, 1.0]]]))
    routing = mod_squad(logits, num_selected=2)
    np.testing.assert_array_equal(routing.expert_index, [[[2, 0]]])
    np.testing.assert_allclose(routing.weight, [[[0.4001, 0.3001]]], rtol=1e-6)
    gates = [[[0.3001, 0.2001, 0.4001, 0.1001]]]
    np.testing.assert_allclose(routing.probabilities, gates, rtol=1e-6)
    assert routing.losses == {}
    assert routing.auxiliary_loss == 0.0


def test_descending_on_mutual_information_gives_tasks_their_experts():
    """Four gates over four experts end with an expert each."""
    router = ModSquad(num_experts=4, num_selected=1, num_tasks=4)
    tokens = jax.random.normal(jax.random.key(0), (1, 64, 8)) + 1.0
    init = router.init(jax.random.key(0), tokens, 0, train=True)
    kernel = init["params"]["gate"]["kernel"].value
    np.testing.assert_array_equal(kernel, np.zeros((4, 8, 4)))

    def loss(kernel):
        variables = {"params": {"gate": {"kernel": kernel}}}
        mean_gates = jax.vmap(
            lambda task: jnp.mean(
                router.apply(variables, tokens, task, train=True).probabilities,
                axis=(0, 1),
            )
        )(jnp.arange(4))
        return mutual_information(mean_gates)

    @jax.jit
    def descend(kernel):
        def step(_, kernel):
            return kernel - 1.0 * jax.grad(loss)(kernel)

        return jax.lax.fori_loop(0, 200, step, kernel)

    # Equal gates are a saddle point.
    kernel = 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)
    assert abs(loss(kernel)) < 0.1
    assert loss(descend(kernel)) < -0.9 * math.log(4)
