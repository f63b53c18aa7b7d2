"""The sparse mixture-of-experts layer."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mtl_jax.layers.mlp import Mlp
from mtl_jax.layers.moe.checks import (
    check_capacity_factor,
    check_condition,
    check_integer,
    check_selected,
    check_tokens,
)
from mtl_jax.layers.moe.dispatch import slots_per_expert
from mtl_jax.layers.moe.dispatcher import Dispatcher, run_dispatcher
from mtl_jax.layers.moe.execution import Execution, choose, run
from mtl_jax.layers.moe.experts import expert_stages
from mtl_jax.layers.moe.gates import fewest_visible
from mtl_jax.layers.moe.record import record, record_dispatcher
from mtl_jax.layers.moe.routers import NoisyTopK
from mtl_jax.layers.moe.routing import Routing
from mtl_jax.sharding import expert_parallel


class MoE(nn.Module):
    """Sends each token to a few of many experts, and adds up what they return.

    The router decides where tokens go; `mtl_jax.layers.moe.routers` has one class for
    each published kind. Tokens that find their experts full get zeros for them, so the
    layer belongs on a residual branch.

    Routing groups are ``group_size`` consecutive examples of the batch. The size is
    fixed here and not taken from the devices: which tokens find an expert full, and
    hence the result, is then the same on any mesh.

    Where the mesh set by ``jax.set_mesh`` has an ``expert`` axis, experts are split
    over it and tokens travel to them. How the experts' rows are laid out, and with
    which kernels they are computed, follows from shapes, mesh and platform; the result
    does not depend on it.

    Some routers fill the experts' buffers themselves, see
    `mtl_jax.layers.moe.dispatcher.Dispatcher`. They have a ``capacity_factor`` of their
    own; this layer's, ``num_selected`` and ``execution`` are for those by which tokens
    choose.

    Two collections are written where they are mutable: ``losses`` has the weighted
    ``auxiliary`` loss, a scalar to add to the objective; ``statistics`` has, averaged
    over groups, ``load`` (fraction of assignments to each expert), ``dropped``
    (fraction of assignments without a slot, or of tokens in no buffer), ``dead``
    (fraction of the task's experts that got no token of the batch), ``entropy`` (of a
    token's gates, in nats), ``gates`` (mean gate of each expert) and the router's
    losses before their weights.

    Attributes:
      num_experts: Number of experts.
      expert_hidden: Hidden units of each expert.
      group_size: Examples in a routing group; it must divide the batch.
      num_selected: Experts each token goes to.
      capacity_factor: Slots of the experts over what balanced routing needs; None for
        experts that take every token sent to them.
      evaluation_capacity_factor: The same where ``train`` is false; V-MoE's S/32 has
        1.05 in training and 4 in evaluation. With None predictions do not depend on
        what else is in the group.
      num_tasks: Number of tasks that the router tells apart, or None.
      num_shared_experts: Further experts that see every token, with weight 1
        (DeepSeekMoE; Dai et al., 2024).
      dtype: Dtype of the experts' computation and the output. Parameters and routing
        are float32.
      expert: Makes one expert, given ``hidden``, ``dtype`` and ``name``.
      router: Makes the router, given ``num_experts``, ``num_selected``, ``num_tasks``
        and ``name``.
      execution: How it is carried out; None for what suits the shapes.
    """

    num_experts: int
    expert_hidden: int
    group_size: int
    num_selected: int = 2
    capacity_factor: float | None = 1.25
    evaluation_capacity_factor: float | Literal["as_in_training"] | None = (
        "as_in_training"
    )
    num_tasks: int | None = None
    num_shared_experts: int = 0
    dtype: DTypeLike = jnp.float32
    expert: Callable[..., nn.Module] = Mlp
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
        """Applies the layer.

        Args:
          x: Tokens of each example.
          task: Index of the task that the router routes for, possibly traced; None
            where there is a single router.
          condition: What routers that do not look at tokens route each example by.
          train: Whether the router may be noisy, which takes the ``router`` key, and
            which capacity the experts have.

        Returns:
          The weighted sum of each token's experts.

        Raises:
          ValueError: If ``x`` or ``condition`` has another shape, or ``x`` is empty; if
            a number of something is no integer; if the batch does not divide into
            groups, or groups and experts not over the mesh; if there is no expert, or
            ``num_selected`` is not in ``[1, num_experts]``; if ``num_shared_experts``
            is negative; if ``capacity_factor`` or ``evaluation_capacity_factor`` is not
            finite and positive; if there is no such ``execution``; or if ``task`` does
            not fit ``num_tasks``.
        """
        check_tokens(x)
        check_condition(condition, x.shape[0])
        self._check(x.shape[0])
        batch, num_tokens, width = x.shape
        num_groups = batch // self.group_size
        expert_parallel.check_divisible(
            num_groups=num_groups, num_experts=self.num_experts
        )
        group_tokens = self.group_size * num_tokens
        groups = x.reshape(num_groups, group_tokens, width)
        if condition is not None:
            condition = jnp.repeat(condition, num_tokens, axis=0).reshape(
                num_groups, group_tokens, -1
            )
        router = self.router(
            num_experts=self.num_experts,
            num_selected=self.num_selected,
            num_tasks=self.num_tasks,
            name="router",
        )
        decision = router(groups, task, condition, train=train)
        output = self._apply_experts(
            groups.astype(self.dtype),
            decision,
            self.limit(train=train),
            fewest_visible(router),
        )
        output = output.reshape(x.shape)
        if self.num_shared_experts:
            shared = self.expert(
                hidden=self.num_shared_experts * self.expert_hidden,
                dtype=self.dtype,
                name="shared_experts",
            )
            output = output + shared(x.astype(self.dtype))
        return output

    def limit(self, *, train: bool) -> float | None:
        """The capacity factor that holds in training, or in evaluation."""
        if train or self.evaluation_capacity_factor == "as_in_training":
            return self.capacity_factor
        return self.evaluation_capacity_factor

    def _apply_experts(
        self,
        groups: Float[Array, "groups tokens width"],
        decision: Routing | Dispatcher,
        capacity_factor: float | None,
        fewest: int,
    ) -> Float[Array, "groups tokens width"]:
        """The experts' weighted outputs; records statistics of the decision."""
        expert = self.expert(
            hidden=self.expert_hidden, dtype=self.dtype, name="experts"
        )
        stages, parameters = expert_stages(
            expert, self.num_experts, groups.shape[-1], self.dtype
        )
        if not isinstance(decision, Routing):
            if self.execution is not None:
                raise ValueError(
                    f"execution={self.execution} is for tokens that choose experts, "
                    "and this router fills the experts' buffers itself; leave it None."
                )
            record_dispatcher(self, decision)
            return run_dispatcher(stages, parameters, groups, decision)
        num_tokens = groups.shape[1]
        capacity = num_tokens
        if capacity_factor is not None:
            capacity = slots_per_expert(
                num_tokens, self.num_experts, self.num_selected, capacity_factor
            )
        how = choose(
            asked=self.execution,
            num_assignments=decision.expert_index.size,
            num_experts=self.num_experts,
            num_selected=self.num_selected,
            capacity_factor=capacity_factor,
            uses_matmuls=hasattr(expert, "stages"),
            parameters=parameters,
        )
        output, dropped = run(
            how, stages, parameters, groups, decision, capacity, fewest
        )
        record(self, decision, dropped)
        return output

    def _check(self, batch: int) -> None:
        for field in ("group_size", "expert_hidden", "num_shared_experts"):
            check_integer(field, getattr(self, field))
        if self.group_size < 1 or batch % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the batch of {batch} "
                "examples; choose a positive divisor of the batch."
            )
        check_selected("num_selected", self.num_selected, self.num_experts)
        check_capacity_factor(self.limit(train=True))
        check_capacity_factor(
            self.limit(train=False), field="evaluation_capacity_factor"
        )
        if self.num_shared_experts < 0:
            raise ValueError(
                f"num_shared_experts={self.num_shared_experts} is negative; make it 0 "
                "for none, or more."
            )
