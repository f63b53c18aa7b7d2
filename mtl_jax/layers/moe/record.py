"""What layers of experts tell about their routing."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mtl_jax.layers.moe.routing import Routing, assigned_fraction, entropy


def record(module: nn.Module, routing: Routing, dropped: Float[Array, ""]) -> None:
    """Writes a layer's collections ``losses`` and ``statistics``.

    Args:
      module: The layer.
      routing: What its router decided.
      dropped: Fraction of assignments without a slot.
    """
    if module.is_initializing():
        return
    num_experts = routing.probabilities.shape[-1]
    load = jnp.mean(assigned_fraction(routing.expert_index, num_experts), axis=0)
    statistics = {
        "load": load,
        "dropped": dropped,
        "dead": jnp.mean((load == 0).astype(jnp.float32)),
        "entropy": entropy(routing.probabilities),
        "gates": jnp.mean(routing.probabilities, axis=(0, 1)),
        **{name: jnp.mean(loss) for name, loss in routing.losses.items()},
    }
    for name, value in statistics.items():
        _sow(module, "statistics", name, value)
    _sow(module, "losses", "auxiliary", routing.auxiliary_loss)


def _sow(module: nn.Module, collection: str, name: str, value: Array) -> None:
    # The value itself rather than a tuple of all that were ever sown.
    module.sow(
        collection,
        name,
        value,
        reduce_fn=lambda _, new: new,
        init_fn=lambda: jnp.zeros(()),
    )
