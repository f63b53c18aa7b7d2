"""The layers of experts of a vision transformer."""

from typing import Any, NamedTuple

from mtl_jax.layers.moe import MoeAttention
from mtl_jax.models.vit import VisionTransformer, layers_of_blocks, routes


class ExpertLayer(NamedTuple):
    """One layer of experts.

    Attributes:
      block: Index of its block.
      kind: ``"moe"``, in place of the perceptron, or ``"attention"``.
      num_experts: Number of experts.
      num_selected: Experts a token goes to.
      capacity_factor: Of the layer, the smaller one of training and evaluation, or of
        a router that fills buffers itself; None where experts take every token.
      visible_experts: How many experts each task sees; None where all see all.
    """

    block: int
    kind: str
    num_experts: int
    num_selected: int
    capacity_factor: float | None
    visible_experts: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Its name in statistics and metrics."""
        name = f"block_{self.block}"
        return name if self.kind == "moe" else f"{name}_{self.kind}"


def expert_layers(trunk: VisionTransformer) -> list[ExpertLayer]:
    """The layers of experts of a trunk, from the first block to the last."""
    found = []
    layers = layers_of_blocks(trunk.moe, trunk.attention, trunk.depth)
    for block, (moe, attention) in enumerate(layers):
        if routes(attention):
            made: Any = attention(trunk.num_heads)
            assert isinstance(made, MoeAttention)
            found.append(_layer(block, "attention", made, made.num_heads))
        if moe is not None:
            made = moe()
            found.append(_layer(block, "moe", made, made.num_selected))
    return found


def _layer(block: int, kind: str, made: Any, num_selected: int) -> ExpertLayer:
    router = made.router(num_experts=made.num_experts, num_selected=num_selected)
    limits = {made.capacity_factor}
    if kind == "moe":
        limits.add(made.limit(train=False))
    smallest = min(limits - {None}, default=None)
    capacity_factor = getattr(router, "capacity_factor", smallest)
    visible_experts = None
    if hasattr(router, "gate"):
        gate = router.gate(num_experts=made.num_experts)
        visible_experts = getattr(gate, "visible_experts", None)
    return ExpertLayer(
        block, kind, made.num_experts, num_selected, capacity_factor, visible_experts
    )
