"""What layers of experts tell about their routing."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mtl_jax.layers.moe.dispatcher import Dispatcher
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
    losses = {name: jnp.mean(loss) for name, loss in routing.losses.items()}
    seen = jnp.ones(num_experts, jnp.bool_)
    if routing.num_visible is not None:
        seen = jnp.arange(num_experts) < routing.num_visible
    statistics = _statistics(load, dropped, routing.probabilities, seen)
    for name, value in (statistics | losses).items():
        _sow(module, "statistics", name, value)
    _sow(module, "losses", "auxiliary", routing.auxiliary_loss)


def record_dispatcher(module: nn.Module, dispatcher: Dispatcher) -> None:
    """Writes the same where the router filled the experts' buffers itself.

    All experts then have the same load, but for those that are hidden from all tokens
    and have no gate; and there is no loss. What is dropped is the fraction of tokens
    that are in no buffer.

    Args:
      module: The layer.
      dispatcher: What its router decided.
    """
    if module.is_initializing():
        return
    seen = jnp.any(dispatcher.probabilities > 0, axis=(0, 1))
    share = seen.astype(jnp.float32)
    load = share / jnp.maximum(jnp.sum(share), 1.0)
    dropped = 1.0 - jnp.mean(dispatcher.processed.astype(jnp.float32))
    statistics = _statistics(load, dropped, dispatcher.probabilities, seen)
    for name, value in statistics.items():
        _sow(module, "statistics", name, value)
    _sow(module, "losses", "auxiliary", jnp.zeros((), jnp.float32))


def _statistics(
    load: Float[Array, " experts"],
    dropped: Float[Array, ""],
    probabilities: Float[Array, "groups tokens experts"],
    seen: Bool[Array, " experts"],
) -> dict[str, Array]:
    return {
        "load": load,
        "dropped": dropped,
        "dead": jnp.mean((load == 0).astype(jnp.float32), where=seen),
        "entropy": entropy(probabilities),
        "gates": jnp.mean(probabilities, axis=(0, 1)),
    }


def _sow(module: nn.Module, collection: str, name: str, value: Array) -> None:
    # The value itself rather than a tuple of all that were ever sown.
    module.sow(
        collection,
        name,
        value,
        reduce_fn=lambda _, new: new,
        init_fn=lambda: jnp.zeros(()),
    )
