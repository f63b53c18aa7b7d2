"""Gates: a logit of every expert for every token, in float32.

A router is a gate and a rule that selects by its logits. Which gate decides what the
choice of experts may depend on: the token, the task, or a condition of the example.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from mtl_jax.layers.mlp import exact_gelu
from mtl_jax.layers.moe.routing import Routing

GateInit = nn.initializers.Initializer

HIDDEN = -1e30
"""Logit of an expert that the task does not see."""

KERNEL_AXES = ("embed", "expert_logits")
"""Logical axes of a gate's kernel."""


def matmul_float32(
    rows: Float[Array, "*rows width"], kernel: Float[Array, "width experts"]
) -> Float[Array, "*rows experts"]:
    """A product in full float32, whatever the dtype of the experts."""
    flat = rows.reshape(-1, rows.shape[-1]).astype(jnp.float32)
    product = jnp.matmul(flat, kernel, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(*rows.shape[:-1], kernel.shape[-1])


def check_task(task: Array | int | None, num_tasks: int | None) -> None:
    """Checks that a task is given exactly where a gate depends on it.

    Args:
      task: Index of the task, possibly traced, or None. The value of a traced one is
        not known, and not checked.
      num_tasks: Number of tasks that the gate knows, None where it looks at none.

    Raises:
      ValueError: If it is missing, superfluous, not a single integer, or not one of
        them.
    """
    if (task is None) != (num_tasks is None):
        raise ValueError(
            f"task={task!r} does not fit num_tasks={num_tasks}: give a task "
            "exactly where there is one router a task."
        )
    if task is None or num_tasks is None:
        return
    if not _is_integer(task):
        raise ValueError(
            f"task={task!r} is not a single integer; give the index of one of "
            f"num_tasks={num_tasks} tasks, counted from 0."
        )
    if not isinstance(task, Tracer) and not 0 <= int(task) < num_tasks:
        raise ValueError(
            f"task={task} is not one of num_tasks={num_tasks} tasks; count from 0."
        )


def _is_integer(value: Any) -> bool:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return value.shape == () and jnp.issubdtype(value.dtype, jnp.integer)
    return isinstance(value, int) and not isinstance(value, bool)


class Gate(nn.Module):
    """A linear map of the token without bias; with ``num_tasks``, one for each task.

    One map a task over shared experts is the multi-gate of M³ViT (Fan et al., 2022)
    and of Mod-Squad (Chen et al., 2023).

    Attributes:
      num_experts: Number of experts.
      num_tasks: Number of maps, or None for one that all tasks share.
      kernel_init: Initialiser of each map. Zeros leave the first choices to the noise,
        so that experts start with equal load (Shazeer et al., 2017, appendix A).
      visible_experts: How many experts each task sees, which are the first ones; None
        where all tasks see all. Experts that are added for new tasks leave the others
        as they are where those do not see them. A task must see as many experts as a
        token goes to, which is the ``num_selected`` of the router that has the gate.
    """

    num_experts: int
    num_tasks: int | None = None
    kernel_init: GateInit = nn.initializers.zeros
    visible_experts: tuple[int, ...] | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "groups tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "groups tokens features"] | None = None,
    ) -> Float[Array, "groups tokens experts"]:
        """The logits; ``condition`` is not looked at.

        Raises:
          ValueError: If ``task`` does not fit ``num_tasks``, or ``visible_experts``
            has not one number a task, each no less than a token's experts and no more
            than all.
        """
        del condition
        check_task(task, self.num_tasks)
        self._check_visible()
        shape = (tokens.shape[-1], self.num_experts)
        kernel = parameter(
            self, "kernel", self.kernel_init, shape, KERNEL_AXES, self.num_tasks
        )
        kernel = of_task(kernel, task)
        if self.visible_experts is None:
            return matmul_float32(tokens, kernel)

        def among(visible: int) -> Array:
            # Of the visible experts' columns alone, as a product with more columns may
            # round otherwise.
            logits = matmul_float32(tokens, kernel[:, :visible])
            # Finite, as routers need it, and without a share in any softmax.
            return _padded(logits, self.num_experts, HIDDEN)

        return _by_visible(self.visible_experts, task, among)

    def _check_visible(self) -> None:
        if self.visible_experts is None:
            return
        if len(self.visible_experts) != self.num_tasks:
            raise ValueError(
                f"visible_experts={self.visible_experts} has not one number for each "
                f"of num_tasks={self.num_tasks}; give as many, or None to show all "
                "experts to all tasks."
            )
        # A router with a capacity of its own lets experts choose, and selects none.
        chooses = not hasattr(self.parent, "capacity_factor")
        needed = getattr(self.parent, "num_selected", 1) if chooses else 1
        for task, visible in enumerate(self.visible_experts):
            if not _is_integer(visible) or not 1 <= visible <= self.num_experts:
                raise ValueError(
                    f"visible_experts={self.visible_experts}: task {task} cannot see "
                    f"{visible!r} of num_experts={self.num_experts}; give an integer "
                    f"from 1 to {self.num_experts}."
                )
            if visible < needed:
                raise ValueError(
                    f"visible_experts={self.visible_experts}: task {task} sees "
                    f"{visible}, but each token goes to num_selected={needed}; show "
                    "the task more experts, or select fewer."
                )


def among_visible(
    gate: nn.Module,
    logits: Float[Array, "groups tokens experts"],
    task: Int[Array, ""] | int | None,
    decide: Callable[[Float[Array, "groups tokens visible"]], Routing],
) -> Routing:
    """What a router of the experts that the task sees decides.

    Weights, losses and noise are those of a router that has no other experts: for a
    model to which experts were added behind these, what it decided before, to the last
    bit.

    Args:
      gate: The gate.
      logits: Its logits of all experts.
      task: Index of the task, or None.
      decide: Takes logits of the visible experts, which are the first ones.

    Returns:
      The decision, in which hidden experts have no gate.
    """
    visible_experts = getattr(gate, "visible_experts", None)
    if visible_experts is None:
        return decide(logits)

    def among(visible: int) -> Routing:
        routing = decide(logits[..., :visible])
        return routing._replace(
            probabilities=_padded(routing.probabilities, logits.shape[-1], 0.0)
        )

    routing = _by_visible(visible_experts, task, among)
    return routing._replace(num_visible=num_visible(gate, task))


def num_visible(
    gate: nn.Module, task: Int[Array, ""] | int | None
) -> Int[Array, ""] | None:
    """How many experts a gate shows to the task; None where it shows all to all."""
    visible_experts = getattr(gate, "visible_experts", None)
    if visible_experts is None:
        return None
    return of_task(jnp.asarray(visible_experts, jnp.int32), task)


def fewest_visible(router: nn.Module) -> int:
    """The least number of experts that some task sees.

    Where experts were added for new tasks, it is how many there were before.
    """
    made: Any = router
    if not hasattr(made, "gate"):
        return made.num_experts
    # Made to look at its fields, and not called.
    gate = made.gate(num_experts=made.num_experts, num_tasks=made.num_tasks)
    visible = getattr(gate, "visible_experts", None)
    return made.num_experts if visible is None else min(visible)


def _by_visible(
    visible_experts: tuple[int, ...],
    task: Int[Array, ""] | int | None,
    among: Callable[[int], Any],
) -> Any:
    """``among`` of the number of experts that the task sees, which is no array."""
    numbers = sorted(set(visible_experts))
    which = jnp.asarray([numbers.index(number) for number in visible_experts])
    branches = [functools.partial(among, number) for number in numbers]
    return jax.lax.switch(of_task(which, task), branches)


def _padded(
    values: Float[Array, "groups tokens visible"], num_experts: int, value: float
) -> Float[Array, "groups tokens experts"]:
    hidden = num_experts - values.shape[-1]
    return jnp.pad(values, ((0, 0), (0, 0), (0, hidden)), constant_values=value)


def parameter(
    module: nn.Module,
    name: str,
    init: GateInit,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    num_tasks: int | None = None,
) -> Array:
    """A parameter of a gate, with logical axis names.

    Args:
      module: The gate.
      name: The parameter's.
      init: Initialiser of one task's.
      shape: Shape of one task's.
      names: Logical axes of that shape.
      num_tasks: With tasks, the parameter has an axis over them in front, and each
        draws its own initial values.

    Returns:
      The parameter.
    """

    def of_all_tasks(key, shape, *rest):
        # The initialiser itself would take the tasks for inputs of one map.
        keys = jax.random.split(key, shape[0])
        return jnp.stack([init(key, shape[1:], *rest) for key in keys])

    boxed: Any = nn.with_logical_partitioning(init, names)
    if num_tasks is not None:
        boxed = nn.with_logical_partitioning(of_all_tasks, ("task", *names))
        shape = (num_tasks, *shape)
    return module.param(name, boxed, shape)


def of_task(
    value: Float[Array, "*tasks_and_axes"], task: Int[Array, ""] | int | None
) -> Float[Array, "..."]:
    """The task's part of a `parameter`, which is all of it without tasks."""
    if task is None:
        return value
    return jax.lax.dynamic_index_in_dim(value, task, keepdims=False)


class TaskConditionedGate(nn.Module):
    """A linear map of the token and an embedding of the task, shared by all tasks.

    M³ViT's second gate (Fan et al., 2022): the task's one-hot vector goes through a
    perceptron of two layers with ReLU, and is appended to each token. As released, the
    perceptron has a GELU and a layer norm behind it instead; there, all layers of a
    model share one, where here each gate has its own.

    Attributes:
      num_experts: Number of experts.
      num_tasks: Number of tasks.
      task_features: Width of the task's embedding and of the layer before it.
      as_released: Whether the perceptron is that of the released code.
      kernel_init: Initialiser of the linear map.
    """

    num_experts: int
    num_tasks: int | None = None
    task_features: int = 64
    as_released: bool = False
    kernel_init: GateInit = nn.initializers.zeros

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "groups tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "groups tokens features"] | None = None,
    ) -> Float[Array, "groups tokens experts"]:
        """The logits; ``condition`` is not looked at.

        Raises:
          ValueError: If there is no task, or it is not one of ``num_tasks``.
        """
        del condition
        if self.num_tasks is None:
            raise ValueError(
                "num_tasks=None, but a task-conditioned gate embeds the task; say how "
                "many tasks there are."
            )
        check_task(task, self.num_tasks)
        one_hot = jax.nn.one_hot(jnp.asarray(task), self.num_tasks, dtype=jnp.float32)
        activation = exact_gelu if self.as_released else jax.nn.relu
        hidden = activation(_embed(self.task_features, "task_hidden")(one_hot))
        embedding = _embed(self.task_features, "task_embedding")(hidden)
        if self.as_released:
            embedding = nn.LayerNorm(name="task_norm")(embedding)
        shape = (tokens.shape[-1], self.num_experts)
        kernel = parameter(self, "kernel", self.kernel_init, shape, KERNEL_AXES)
        shape = (self.task_features, self.num_experts)
        task_kernel = parameter(
            self, "task_kernel", self.kernel_init, shape, KERNEL_AXES
        )
        shift = matmul_float32(embedding[None], task_kernel)
        return matmul_float32(tokens, kernel) + shift[None]


def _embed(features: int, name: str) -> nn.Module:
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), (None, None)
        ),
        name=name,
    )


class ConditionGate(nn.Module):
    """A linear map of the example's condition alone, such as a timestep's embedding.

    The gate of Switch-DiT (Park et al., 2024): ``Linear(SiLU(condition))``. All tokens
    of an example go to the same experts.

    Attributes:
      num_experts: Number of experts.
      num_tasks: None; the condition says all.
      kernel_init: Initialiser of the linear map.
    """

    num_experts: int
    num_tasks: int | None = None
    kernel_init: GateInit = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "groups tokens width"],
        task: Int[Array, ""] | int | None = None,
        condition: Float[Array, "groups tokens features"] | None = None,
    ) -> Float[Array, "groups tokens experts"]:
        """The logits; of ``tokens`` only the shape matters.

        Raises:
          ValueError: If the condition is missing, or a task is given.
        """
        check_task(task, self.num_tasks)
        if condition is None:
            raise ValueError(
                "condition=None, but this gate routes by the condition; give one "
                "vector an example."
            )
        shape = (condition.shape[-1], self.num_experts)
        kernel = parameter(self, "kernel", self.kernel_init, shape, KERNEL_AXES)
        bias = parameter(
            self,
            "bias",
            nn.initializers.zeros,
            (self.num_experts,),
            ("expert_logits",),
        )
        return matmul_float32(jax.nn.silu(condition), kernel) + bias[None, None]


MakeGate = Callable[..., nn.Module]
"""Makes a gate, given ``num_experts``, ``num_tasks`` and ``name``."""
