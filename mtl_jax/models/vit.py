"""Vision transformers, dense or with sparse mixtures of experts."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.mlp import Mlp
from mtl_jax.layers.moe.gates import check_task
from mtl_jax.layers.patch import (
    PatchEmbedding,
    resize_positions,
    sincos_position_embedding,
    to_pixels,
)

Maker = Callable[..., nn.Module]
"""Makes a layer of a block, such as a partial of its class."""


def layers_of_blocks(
    moe: Maker | tuple[Maker | None, ...] | None,
    attention: Maker | tuple[Maker, ...],
    depth: int,
) -> list[tuple[Maker | None, Maker]]:
    """What makes the mixture of experts and the attention of each block.

    Args:
      moe: As `VisionTransformer` has it.
      attention: Likewise.
      depth: Number of blocks.
    """
    mixtures: Any = moe if isinstance(moe, tuple) else (None, moe)
    attentions: Any = attention if isinstance(attention, tuple) else (attention,)
    for name, makers in (("moe", mixtures), ("attention", attentions)):
        if not makers:
            raise ValueError(f"{name} is (); give it a layer or None for each block")
    return [
        (mixtures[i % len(mixtures)], attentions[i % len(attentions)])
        for i in range(depth)
    ]


def routes(attention: Maker) -> bool:
    """Whether an attention layer has routers: then it has a field ``num_tasks``."""
    return "num_tasks" in inspect.signature(attention).parameters


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP or a mixture of experts.

    Attributes:
      num_heads: Attention heads.
      hidden: Hidden width of the dense MLP.
      moe: Makes the mixture of experts that replaces the MLP, or None.
      num_tasks: Number of routers of a layer, one a task; None for a shared one.
      attention: Makes the attention layer. One with a field ``num_tasks``, such as
        `mtl_jax.layers.moe.MoeAttention`, is called with task and condition as ``moe``
        is.
      mlp: Makes the dense MLP.
      layer_scale: What the learned scale of each branch begins with; None for none.
      norm_epsilon: Added to variances by layer norms.
      dtype: Type that is computed in.
    """

    num_heads: int
    hidden: int
    moe: Callable[..., nn.Module] | None
    num_tasks: int | None
    attention: Callable[..., nn.Module] = SelfAttention
    mlp: Callable[..., nn.Module] = Mlp
    layer_scale: float | None = None
    norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        task: Int[Array, ""] | None,
        condition: Float[Array, "batch features"] | None,
        train: bool,
    ) -> Float[Array, "batch tokens width"]:
        """The block's output for the tokens of a batch."""
        norm = functools.partial(
            nn.LayerNorm, epsilon=self.norm_epsilon, dtype=self.dtype
        )
        y = norm(name="attention_norm")(x)
        attention = functools.partial(
            self.attention, self.num_heads, dtype=self.dtype, name="attention"
        )
        if routes(self.attention):
            y = attention(num_tasks=self.num_tasks)(y, task, condition, train=train)
        else:
            y = attention()(y)
        x = x + self._scaled("attention_scale", y)
        y = norm(name="mlp_norm")(x)
        if self.moe is None:
            y = self.mlp(self.hidden, dtype=self.dtype, name="mlp")(y)
        else:
            moe = self.moe(num_tasks=self.num_tasks, dtype=self.dtype, name="moe")
            y = moe(y, task, condition, train=train)
        return x + self._scaled("mlp_scale", y)

    def _scaled(
        self, name: str, y: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """A branch times its learned scale (LayerScale; Touvron et al., 2021)."""
        if self.layer_scale is None:
            return y
        initial = nn.initializers.constant(self.layer_scale)
        scale = self.param(
            name, nn.with_logical_partitioning(initial, ("embed",)), y.shape[-1:]
        )
        return y * jnp.asarray(scale, self.dtype)[None, None]


class Blocks(nn.Module):
    """A few blocks one after another, as ``jax.lax.scan`` repeats them.

    Attributes:
      block: Makes a block, given ``moe``, ``attention`` and ``name``.
      layers: What makes the mixture of experts and the attention of each block.
      train: Whether routers are noisy.
    """

    block: Maker
    layers: tuple[tuple[Maker | None, Maker], ...]
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        task: Int[Array, ""] | None,
        condition: Float[Array, "batch features"] | None,
        task_vector: Float[Array, " width"] | None,
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        """The last block's output, and nothing to stack."""
        return apply_blocks(
            self.block, self.layers, x, task, condition, task_vector, self.train
        ), None


def apply_blocks(
    block: Maker,
    layers: Sequence[tuple[Maker | None, Maker]],
    x: Float[Array, "batch tokens width"],
    task: Int[Array, ""] | None,
    condition: Float[Array, "batch features"] | None,
    task_vector: Float[Array, " width"] | None,
    train: bool,
) -> Float[Array, "batch tokens width"]:
    """Makes blocks ``block_0``, ``block_1``, ... of the calling module; applies them.

    Args:
      block: As `Blocks` has it.
      layers: Likewise.
      x: Tokens.
      task: Index of the task whose routers to use.
      condition: What routers of examples look at, or None.
      task_vector: What is added to all tokens before every block, or None.
      train: Whether routers are noisy.
    """
    for i, (moe, attention) in enumerate(layers):
        x = x if task_vector is None else x + task_vector[None, None]
        made = block(moe=moe, attention=attention, name=f"block_{i}")
        x = made(x, task, condition, train)
    return x


class VisionTransformer(nn.Module):
    """A vision transformer trunk with token features for dense and global heads.

    The architecture is that of Dosovitskiy et al. (2021), by default with fixed
    sine-cosine positions and no class token, so that images of several sizes share one
    trunk. Its other fields are what published trunks have; `mtl_jax.models.pretrained`
    knows which ones need what.

    With ``moe`` every second block (1, 3, ...) has a mixture of experts instead of
    its MLP, as in V-MoE (Riquelme et al., 2021) and M³ViT (Fan et al., 2022). With
    ``num_tasks`` each task has routers of its own over shared experts (M³ViT's
    multi-gate) and needs a forward pass of its own.

    Attributes:
      width: Channels of a token.
      depth: Number of blocks.
      num_heads: Attention heads.
      patch_size: Side of a patch, in pixels.
      mlp_ratio: Hidden width of the dense MLPs, in units of ``width``; rounded to a
        whole number of hidden units.
      moe: Makes the mixture of experts of a block (such as a partial
        `mtl_jax.layers.moe.MoE`), or None for a dense trunk. A tuple says it block by
        block, with None for an MLP; a short one begins anew behind its end, so that
        ``moe`` is ``(None, moe)``.
      num_tasks: Number of tasks, for a router a task; None for a trunk that all
        tasks share.
      task_embedding: Whether a learned vector of the task is added to all tokens
        before every block, as in Mod-Squad (Chen et al., 2023).
      num_channels: Channels of the widest image; grey images are repeated to it.
      embedding: Makes the module that embeds patches.
      attention: Makes the attention layer of a block, such as a partial
        `mtl_jax.layers.attention.SelfAttention` or `mtl_jax.layers.moe.MoeAttention`.
        A tuple says it block by block, as for ``moe``.
      mlp: Makes the MLP of a dense block, such as a partial
        `mtl_jax.layers.mlp.Mlp`, or `mtl_jax.layers.mlp.SwiGlu`.
      layer_scale: What the learned scales of each block's two branches begin with;
        None for blocks without (LayerScale; Touvron et al., 2021).
      norm_epsilon: Added to variances by layer norms.
      class_token: A learned token that sees all patches. Heads need a feature at each
        position of the grid: ``"inside"`` keeps the token to the trunk, and
        ``"appended"`` appends its feature to that of each position, which doubles the
        channels; a head that takes the mean over positions then has both, and so has
        one that predicts pixels.
      num_registers: Further learned tokens, which stay inside (Darcet et al., 2024).
      position_grid: Rows and columns of learned position embeddings, resized to the
        grid of each image (`mtl_jax.layers.patch.resize_positions`); None for fixed
        sine-cosine ones.
      antialias_positions: Whether resizing takes out what a smaller grid cannot hold.
      pre_norm: Whether a layer norm precedes the blocks, as in CLIP.
      final_norm: Whether one follows them.
      remat: Whether to recompute each block in the backward pass.
      scan: Whether to loop over the blocks by ``jax.lax.scan``, as many of them
        together as differ: the time to compile does not grow with ``depth``.
        Parameters are stacked under ``blocks``, with the logical axis ``layers`` in
        front.
      dtype: Type that is computed in.
    """

    width: int = 192
    depth: int = 12
    num_heads: int = 3
    patch_size: int = 16
    mlp_ratio: float = 4
    moe: Maker | tuple[Maker | None, ...] | None = None
    num_tasks: int | None = None
    task_embedding: bool = False
    num_channels: int = 3
    embedding: Callable[..., nn.Module] = PatchEmbedding
    attention: Maker | tuple[Maker, ...] = SelfAttention
    mlp: Callable[..., nn.Module] = Mlp
    layer_scale: float | None = None
    norm_epsilon: float = 1e-6
    class_token: Literal["absent", "inside", "appended"] = "absent"
    num_registers: int = 0
    position_grid: tuple[int, int] | None = None
    antialias_positions: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    remat: bool = False
    scan: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def period(self) -> int:
        """Number of blocks after which the kinds of their layers repeat."""
        mixtures = 1 if self.moe is None else 2
        if isinstance(self.moe, tuple):
            mixtures = len(self.moe)
        attentions = len(self.attention) if isinstance(self.attention, tuple) else 1
        return math.lcm(mixtures, attentions)

    @nn.compact
    def __call__(
        self,
        images: Array,
        task: Int[Array, ""] | None = None,
        condition: Float[Array, "batch features"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch rows columns features"]:
        """Token features of images.

        Args:
          images: ``[batch, height, width, channels]``, bytes or floats in [-1, 1].
          task: Index of the task whose routers to use, with ``num_tasks`` and only
            then. The value of a traced one, as under ``jax.jit``, is not checked: out
            of range, it gives features that mean nothing.
          condition: A vector of each example, such as the embedding of a timestep, for
            routers whose gate looks at it (`mtl_jax.layers.moe.gates.ConditionGate`).
          train: Whether routers are noisy.

        Returns:
          The features of each patch, in their grid: ``width`` channels, or twice that
          with an appended class token.

        Raises:
          ValueError: If the task is missing, superfluous, or known and out of range;
            if there is a condition but no layer of experts that could look at it; or if
            the sizes do not fit.
        """
        check_task(task, self.num_tasks)
        layers = layers_of_blocks(self.moe, self.attention, self.depth)
        if condition is not None and not any(
            moe is not None or routes(attention) for moe, attention in layers
        ):
            raise ValueError(
                f"condition has shape {condition.shape}, but no block has experts that "
                "are routed by it; leave it None, or give the trunk moe"
            )
        x = self.embedding(
            self.width, self.patch_size, dtype=self.dtype, name="embedding"
        )(to_pixels(images, self.num_channels))
        batch, rows, columns, _ = x.shape
        x = x + jnp.asarray(self._positions(rows, columns), self.dtype)[None]
        x = x.reshape(batch, rows * columns, self.width)
        extra = self._extra_tokens()
        if len(extra):
            tokens = jnp.asarray(extra, self.dtype)[None]
            tokens = jnp.broadcast_to(tokens, (batch, *extra.shape))
            x = jnp.concatenate([tokens, x], axis=1)
        norm = functools.partial(
            nn.LayerNorm, epsilon=self.norm_epsilon, dtype=self.dtype
        )
        if self.pre_norm:
            x = norm(name="pre_norm")(x)
        # Whether to train (argument 4) decides what is traced: it stays a Python bool.
        block = functools.partial(
            nn.remat(Block, static_argnums=(4,)) if self.remat else Block,
            num_heads=self.num_heads,
            hidden=round(self.mlp_ratio * self.width),
            num_tasks=self.num_tasks,
            mlp=self.mlp,
            layer_scale=self.layer_scale,
            norm_epsilon=self.norm_epsilon,
            dtype=self.dtype,
        )
        task_vector = self._task_vector(task)
        if self.scan:
            scanned = self._scanned(block, layers, train)
            x, _ = scanned(x, task, condition, task_vector)
        else:
            x = apply_blocks(block, layers, x, task, condition, task_vector, train)
        if self.final_norm:
            x = norm(name="norm")(x)
        patches = x[:, len(extra) :].reshape(batch, rows, columns, self.width)
        if self.class_token != "appended":
            return patches
        classes = jnp.broadcast_to(x[:, :1, None], patches.shape)
        return jnp.concatenate([patches, classes], axis=-1)

    def _scanned(self, block: Maker, layers: list, train: bool) -> nn.Module:
        if self.depth % self.period:
            raise ValueError(
                f"depth={self.depth} is no multiple of the {self.period} blocks that "
                "scan repeats; choose another depth, or scan=False"
            )
        scanned = nn.scan(
            Blocks,
            variable_axes=dict.fromkeys(
                ("params", "losses", "statistics", "balance"), 0
            ),
            split_rngs={"params": True, "router": True},
            in_axes=(nn.broadcast,) * 3,  # type: ignore[arg-type]
            length=self.depth // self.period,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(block, tuple(layers[: self.period]), train, name="blocks")

    def _task_vector(self, task: Int[Array, ""] | None) -> Array | None:
        if not self.task_embedding:
            return None
        if self.num_tasks is None or task is None:
            raise ValueError(
                "task_embedding is True, but num_tasks is None; set num_tasks to the "
                "number of tasks"
            )
        initial = nn.with_logical_partitioning(
            nn.initializers.normal(0.02), ("task", "embed")
        )
        vectors = self.param("task_embedding", initial, (self.num_tasks, self.width))
        vector = jax.lax.dynamic_index_in_dim(vectors, task, keepdims=False)
        return jnp.asarray(vector, self.dtype)

    def _positions(
        self, rows: int, columns: int
    ) -> Float[Array | np.ndarray, "rows columns width"]:
        """Position embeddings of a grid."""
        if self.position_grid is None:
            return sincos_position_embedding(rows, columns, self.width)
        if min(self.position_grid) < 1:
            raise ValueError(
                f"position_grid is {self.position_grid}; it must be at least 1x1, or "
                "None for sine-cosine positions"
            )
        return resize_positions(
            self._learned("positions", (*self.position_grid, self.width)),
            rows,
            columns,
            antialias=self.antialias_positions,
        )

    def _extra_tokens(self) -> Float[Array, "tokens width"]:
        """The tokens that stand for no patch: that of the class first."""
        if self.class_token not in ("absent", "inside", "appended"):
            raise ValueError(
                f'class_token is {self.class_token!r}; use "absent", "inside" or '
                '"appended"'
            )
        if self.num_registers < 0:
            raise ValueError(
                f"num_registers is {self.num_registers}; it must be at least 0"
            )
        tokens = [jnp.zeros((0, self.width))]
        if self.class_token != "absent":
            tokens.append(self._learned("class_token", (1, self.width)))
        if self.num_registers:
            tokens.append(self._learned("registers", (self.num_registers, self.width)))
        return jnp.concatenate(tokens)

    def _learned(self, name: str, shape: tuple[int, ...]) -> Array:
        names = ("tokens",) + (None,) * (len(shape) - 2) + ("embed",)
        initial = nn.with_logical_partitioning(nn.initializers.normal(0.02), names)
        return self.param(name, initial, shape)  # type: ignore[return-value]
