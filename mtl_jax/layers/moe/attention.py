"""Attention whose heads are experts, of which each token picks a few."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mtl_jax.layers.low_rank import LowRank
from mtl_jax.layers.moe.checks import (
    check_capacity_factor,
    check_condition,
    check_selected,
    check_tokens,
)
from mtl_jax.layers.moe.dispatch import slots_per_expert
from mtl_jax.layers.moe.execution import Execution, choose, run
from mtl_jax.layers.moe.experts import expert_stages
from mtl_jax.layers.moe.gates import fewest_visible
from mtl_jax.layers.moe.record import record
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.layers.moe.routing import Routing
from mtl_jax.sharding import expert_parallel


class MoeAttention(nn.Module):
    """Self-attention with a mixture of heads (Mod-Squad; Chen et al., 2023).

    An expert is what a head has to itself: a projection to queries, and one of what was
    attended to back to the width. Each token picks ``num_heads`` of the experts. Keys
    and values are the same for all of them, so that any token can be attended to with
    any expert. The gates weigh what the experts return, and not the queries.

    A routing group is one example. Where the mesh set by ``jax.set_mesh`` has an axis
    ``expert``, experts are split over it: queries come from the devices that have the
    experts, attention is computed where the example is, and its result goes to the
    experts again.

    The collections ``losses`` and ``statistics`` are written as by
    `mtl_jax.layers.moe.MoE`.

    Attributes:
      num_heads: Experts that each token picks.
      num_experts: Number of experts.
      head_width: Width of queries, keys and values; None for the width of a token over
        ``num_heads``. Mod-Squad has twice that.
      capacity_factor: As `mtl_jax.layers.moe.MoE` has it, for each example; None for
        experts that take every token.
      num_tasks: Number of tasks that the router tells apart, or None.
      dtype: Dtype of the computation and the output. Parameters and routing are
        float32.
      router: Makes the router, given ``num_experts``, ``num_selected``, ``num_tasks``
        and ``name``.
      execution: How experts are carried out; None for what suits the shapes.
    """

    num_heads: int
    num_experts: int
    head_width: int | None = None
    capacity_factor: float | None = None
    num_tasks: int | None = None
    dtype: DTypeLike = jnp.float32
    router: Callable[..., nn.Module] = NoisyTopK
    execution: Execution | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "batch features"] | None = None,
        *,
        train: bool,
    ) -> Float[Array, "batch tokens width"]:
        """Lets every token attend to all tokens of its sequence.

        Args:
          x: Tokens of each example.
          task: Index of the task that the router routes for, possibly traced; None
            where there is a single router.
          condition: What routers that do not look at tokens route each example by.
          train: Whether the router may be noisy, which takes the ``router`` key.

        Raises:
          ValueError: If ``x`` or ``condition`` has another shape; if there is no
            expert, or ``num_heads`` is not in ``[1, num_experts]`` or, without a
            ``head_width``, does not divide the width; if batch or experts do not divide
            over the mesh; if ``capacity_factor`` is not finite or leaves no slot; if
            there is no such ``execution``; if ``task`` does not fit ``num_tasks``; or
            if the router fills buffers itself.
        """
        check_tokens(x)
        check_condition(condition, x.shape[0])
        check_selected("num_heads", self.num_heads, self.num_experts)
        check_capacity_factor(self.capacity_factor)
        batch, num_tokens, width = x.shape
        head_width = self._head_width(width)
        expert_parallel.check_divisible(num_groups=batch, num_experts=self.num_experts)
        router = self.router(
            num_experts=self.num_experts,
            num_selected=self.num_heads,
            num_tasks=self.num_tasks,
            name="router",
        )
        if condition is not None:
            condition = jnp.repeat(condition[:, None], num_tokens, axis=1)
        routing = router(x, task, condition, train=train)
        if not isinstance(routing, Routing):
            raise ValueError(
                "router: attention needs one by which tokens choose experts, and this "
                "one fills the experts' buffers itself; choose another, such as "
                "NoisyTopK."
            )
        x = x.astype(self.dtype)
        # The projections to queries and from what was attended are its two stages.
        expert = LowRank(head_width, dtype=self.dtype, name="experts")
        (to_query, to_output), parameters = expert_stages(
            expert, self.num_experts, width, self.dtype
        )
        how = choose(
            asked=self.execution,
            num_assignments=routing.expert_index.size,
            num_experts=self.num_experts,
            num_selected=self.num_heads,
            capacity_factor=self.capacity_factor,
            uses_matmuls=True,
            parameters=parameters,
        )
        capacity = num_tokens
        if self.capacity_factor is not None:
            capacity = slots_per_expert(
                num_tokens, self.num_experts, self.num_heads, self.capacity_factor
            )
        each: Any = routing._replace(weight=None)
        fewest = fewest_visible(router)
        query, dropped = run(
            how, (to_query,), {"down": parameters["down"]}, x, each, capacity, fewest
        )
        key, value = (self._shared(name, head_width)(x) for name in ("key", "value"))
        # It takes the softmax in float32 by promoting implicitly.
        with jax.numpy_dtype_promotion("standard"):
            attended = jax.nn.dot_product_attention(
                query, key[:, :, None], value[:, :, None]
            )
        output, _ = run(
            how,
            (to_output,),
            {"up": parameters["up"]},
            attended,
            routing,
            capacity,
            fewest,
        )
        record(self, routing, dropped)
        return output

    def _head_width(self, width: int) -> int:
        if self.head_width is not None:
            return self.head_width
        if width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide the width {width}; "
                "choose a divisor of the width, or a head_width."
            )
        return width // self.num_heads

    def _shared(self, name: str, features: int) -> nn.Module:
        """A projection that all experts share."""
        return nn.Dense(
            features,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.xavier_uniform(), ("embed", "kv")
            ),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("kv",)),
            name=name,
        )
