"""The sparse mixture-of-experts layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mtl_jax.layers.mlp import Mlp
from mtl_jax.layers.moe import dispatch, router
from mtl_jax.layers.moe.experts import apply_experts
from mtl_jax.sharding import expert_parallel


class MoE(nn.Module):
    """Sends each token to a few of many experts, and adds up what they return.

    With ``num_tasks`` there is one router a task over shared experts, the multi-gate
    of M³ViT (Fan et al., 2022); without, one router for all, as in V-MoE (Riquelme et
    al., 2021). Tokens that find their experts full get zeros for them, so the layer
    belongs on a residual branch.

    Routing groups are ``group_size`` consecutive examples of the batch. The size is
    fixed here and not taken from the devices: which tokens find an expert full, and
    hence the result, is then the same on any mesh.

    Where the mesh set by ``jax.set_mesh`` has an ``expert`` axis, experts are split
    over it and tokens travel to them.

    Two collections are written where they are mutable: ``losses`` has the weighted
    ``auxiliary`` loss, a scalar to add to the objective; ``statistics`` has, averaged
    over groups, ``load`` (fraction of assignments to each expert), ``dropped``
    (fraction of assignments without a slot), ``dead`` (fraction of experts that got
    no token of the batch), ``entropy`` (of a token's gates, in nats),
    ``importance_loss`` and ``load_loss`` (before their weights).

    Attributes:
      num_experts: Number of experts.
      expert_hidden: Hidden units of each expert.
      group_size: Examples in a routing group; it must divide the batch.
      num_selected: Experts each token goes to.
      capacity_factor: Slots of the experts over what balanced routing needs.
      num_tasks: Number of routers, or None for a single one.
      noise_std: Standard deviation of the noise on the logits in training, times the
        number of experts.
      importance_weight: Weight of the importance loss.
      load_weight: Weight of the load loss.
      dtype: Dtype of the experts' computation and the output. Parameters and routing
        are float32.
      expert: Makes one expert, given ``hidden``, ``dtype`` and ``name``.
      router_init: Initialiser of the routers' kernels. Zeros leave the first choices
        to the noise, so that experts start with equal load (Shazeer et al., 2017,
        appendix A).
    """

    num_experts: int
    expert_hidden: int
    group_size: int
    num_selected: int = 2
    capacity_factor: float = 1.25
    num_tasks: int | None = None
    noise_std: float = 1.0
    importance_weight: float = 0.005
    load_weight: float = 0.005
    dtype: DTypeLike = jnp.float32
    expert: Callable[..., nn.Module] = Mlp
    router_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        task: Int[Array, ""] | int | None = None,
        *,
        train: bool,
    ) -> Float[Array, "batch tokens width"]:
        """Applies the layer.

        Args:
          x: Tokens of each example.
          task: Index of the task whose router decides, possibly traced; None where
            there is a single router.
          train: Whether to add noise to the logits, which takes the ``router`` key.

        Returns:
          The weighted sum of each token's experts.

        Raises:
          ValueError: If the batch does not divide into groups, or groups and experts
            not over the mesh; if ``num_selected`` is not in ``[1, num_experts]``; if
            ``capacity_factor`` leaves no slot; or if ``task`` does not fit
            ``num_tasks``.
        """
        self._check(x.shape[0], task)
        batch, num_tokens, width = x.shape
        num_groups = batch // self.group_size
        group_tokens = self.group_size * num_tokens
        expert_parallel.check_divisible(
            num_groups=num_groups, num_experts=self.num_experts
        )
        capacity = dispatch.slots_per_expert(
            group_tokens, self.num_experts, self.num_selected, self.capacity_factor
        )
        groups = x.reshape(num_groups, group_tokens, width)
        logits = self._logits(groups, task)
        noise = None
        if train and self.noise_std > 0:
            noise = jax.random.normal(self.make_rng("router"), logits.shape)

        routing = router.route(
            logits, noise, num_selected=self.num_selected, noise_std=self.noise_std
        )

        def send(tokens: Array, expert_index: Array) -> tuple[Array, dispatch.Slots]:
            slots = dispatch.assign_slots(expert_index, self.num_experts, capacity)
            return dispatch.dispatch(tokens, slots), slots

        buffers, slots = expert_parallel.map_groups(
            send, in_axes=(0, 0), out_axes=(1, 0)
        )(groups.astype(self.dtype), routing.expert_index)
        buffers = expert_parallel.exchange(buffers)
        expert = self.expert(
            hidden=self.expert_hidden, dtype=self.dtype, name="experts"
        )
        buffers = expert_parallel.exchange_back(apply_experts(expert, buffers))
        output = expert_parallel.map_groups(
            dispatch.combine, in_axes=(1, 0, 0), out_axes=0
        )(buffers, routing.weight, slots)
        self._record(routing, slots)
        return output.reshape(x.shape)

    def _logits(
        self, groups: Float[Array, "groups tokens width"], task: Array | int | None
    ) -> Float[Array, "groups tokens experts"]:
        """The router's logits, in float32 whatever the dtype of the experts."""
        shape, names = (groups.shape[-1], self.num_experts), ("embed", "expert_logits")
        if self.num_tasks is not None:
            shape, names = (self.num_tasks, *shape), ("task", *names)
        init = nn.with_logical_partitioning(self.router_init, names)
        kernel = self.param("router", init, shape)
        if self.num_tasks is not None:
            kernel = jax.lax.dynamic_index_in_dim(kernel, task, keepdims=False)
        rows = groups.reshape(-1, groups.shape[-1]).astype(jnp.float32)
        logits = jnp.einsum(
            "nd,de->ne", rows, kernel, precision=jax.lax.Precision.HIGHEST
        )
        return logits.reshape(*groups.shape[:2], self.num_experts)

    def _check(self, batch: int, task: Array | int | None) -> None:
        if self.group_size < 1 or batch % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the batch of {batch} "
                "examples; choose a positive divisor of the batch."
            )
        if not 1 <= self.num_selected <= self.num_experts:
            raise ValueError(
                f"num_selected={self.num_selected} is not between 1 and "
                f"num_experts={self.num_experts}."
            )
        if (task is None) != (self.num_tasks is None):
            raise ValueError(
                f"task={task!r} does not fit num_tasks={self.num_tasks}: give a task "
                "exactly where there is one router a task."
            )
        if isinstance(task, int) and not 0 <= task < (self.num_tasks or 0):
            raise ValueError(
                f"task={task} is not one of num_tasks={self.num_tasks} tasks; count "
                "from 0."
            )

    def _record(self, routing: router.Routing, slots: dispatch.Slots) -> None:
        if self.is_initializing():
            return
        load = jnp.mean(routing.load, axis=0)
        kept = slots.slot >= 0
        importance_loss = jnp.mean(routing.importance_loss)
        load_loss = jnp.mean(routing.load_loss)
        statistics = {
            "load": load,
            "dropped": 1.0 - jnp.mean(kept.astype(jnp.float32)),
            "dead": jnp.mean((load == 0).astype(jnp.float32)),
            "entropy": jnp.mean(routing.entropy),
            "importance_loss": importance_loss,
            "load_loss": load_loss,
        }
        for name, value in statistics.items():
            self._sow("statistics", name, value)
        self._sow(
            "losses",
            "auxiliary",
            self.importance_weight * importance_loss + self.load_weight * load_loss,
        )

    def _sow(self, collection: str, name: str, value: Array) -> None:
        # The value itself rather than a tuple of all that were ever sown.
        self.sow(
            collection,
            name,
            value,
            reduce_fn=lambda _, new: new,
            init_fn=lambda: jnp.zeros(()),
        )
