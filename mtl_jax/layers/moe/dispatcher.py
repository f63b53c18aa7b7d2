"""What a router decides, where it fills the experts' buffers itself."""

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.layers.moe.experts import apply_buffers
from mtl_jax.layers.moe.grouped import Stage
from mtl_jax.sharding import expert_parallel


class Dispatcher(Protocol):
    """How tokens get into buffers, and outputs back to tokens; the name is V-MoE's.

    For routers by which tokens do not choose experts. It is a pytree of arrays with the
    groups in front, and treats groups independently: on a mesh each device has the part
    of its own groups.
    """

    @property
    def probabilities(self) -> Float[Array, "groups tokens experts"]:
        """Gate of every expert for each token, which statistics are taken of."""
        ...

    @property
    def processed(self) -> Bool[Array, "groups tokens"]:
        """Which tokens are in some expert's buffer."""
        ...

    def dispatch(
        self, tokens: Float[Array, "groups tokens width"]
    ) -> Float[Array, "experts groups capacity width"]:
        """The experts' buffers, in the dtype of the tokens."""
        ...

    def combine(
        self, buffers: Float[Array, "experts groups capacity width"]
    ) -> Float[Array, "groups tokens width"]:
        """What each token gets of the experts' outputs."""
        ...


def run_dispatcher(
    stages: Sequence[Stage],
    parameters: PyTree,
    groups: Float[Array, "groups tokens width"],
    dispatcher: Dispatcher,
) -> Float[Array, "groups tokens width"]:
    """Applies experts to the buffers that a router filled.

    Where experts are split over devices, buffers travel to them and back.

    Args:
      stages: What an expert does.
      parameters: Parameters of all experts, with a leading axis over them.
      groups: Tokens, in the dtype of the experts.
      dispatcher: What the router decided.
    """
    buffers = expert_parallel.map_groups(
        lambda dispatcher, groups: dispatcher.dispatch(groups),
        in_axes=(0, 0),
        out_axes=1,
    )(dispatcher, groups)
    buffers = apply_buffers(stages, parameters, expert_parallel.exchange(buffers))
    return expert_parallel.map_groups(
        lambda dispatcher, buffers: dispatcher.combine(buffers),
        in_axes=(0, 1),
        out_axes=0,
    )(dispatcher, expert_parallel.exchange_back(buffers))
