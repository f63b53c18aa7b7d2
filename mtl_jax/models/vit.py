"""Vision transformers, dense or with sparse mixtures of experts."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mtl_jax.layers.attention import SelfAttention
from mtl_jax.layers.mlp import Mlp
from mtl_jax.layers.patch import (
    PatchEmbedding,
    sincos_position_embedding,
    to_pixels,
)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP or a mixture of experts.

    Attributes:
      num_heads: Attention heads.
      hidden: Hidden width of the dense MLP.
      moe: Makes the mixture of experts that replaces the MLP, or None.
      num_tasks: Number of the mixture's routers, one a task; None for a shared one.
      dtype: Type that is computed in.
    """

    num_heads: int
    hidden: int
    moe: Callable[..., nn.Module] | None
    num_tasks: int | None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        task: Int[Array, ""] | None,
        train: bool,
    ) -> Float[Array, "batch tokens width"]:
        """The block's output for the tokens of a batch."""
        y = nn.LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        x = x + SelfAttention(self.num_heads, dtype=self.dtype, name="attention")(y)
        y = nn.LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        if self.moe is None:
            return x + Mlp(self.hidden, dtype=self.dtype, name="mlp")(y)
        moe = self.moe(num_tasks=self.num_tasks, dtype=self.dtype, name="moe")
        return x + moe(y, task, train=train)


class VisionTransformer(nn.Module):
    """A vision transformer trunk with token features for dense and global heads.

    The architecture is that of Dosovitskiy et al. (2021) with fixed sine-cosine
    positions and no class token, so that images of several sizes share one trunk.
    With ``moe`` every second block (1, 3, ...) has a mixture of experts instead of
    its MLP, as in V-MoE (Riquelme et al., 2021) and M³ViT (Fan et al., 2022). With
    ``num_tasks`` each task has routers of its own over shared experts (M³ViT's
    multi-gate) and needs a forward pass of its own.

    Attributes:
      width: Channels of a token.
      depth: Number of blocks.
      num_heads: Attention heads.
      patch_size: Side of a patch, in pixels.
      mlp_ratio: Hidden width of the dense MLPs, in units of ``width``.
      moe: Makes the mixture of experts of a block (such as a partial
        `mtl_jax.layers.moe.MoE`), or None for a dense trunk.
      num_tasks: Number of tasks, for a router a task; None for a trunk that all
        tasks share.
      num_channels: Channels of the widest image; grey images are repeated to it.
      embedding: Makes the module that embeds patches.
      remat: Whether to recompute each block in the backward pass.
      dtype: Type that is computed in.
    """

    width: int = 192
    depth: int = 12
    num_heads: int = 3
    patch_size: int = 16
    mlp_ratio: int = 4
    moe: Callable[..., nn.Module] | None = None
    num_tasks: int | None = None
    num_channels: int = 3
    embedding: Callable[..., nn.Module] = PatchEmbedding
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Array,
        task: Int[Array, ""] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch rows columns width"]:
        """Token features of images.

        Args:
          images: ``[batch, height, width, channels]``, bytes or floats in [-1, 1].
          task: Index of the task whose routers to use; needed with ``num_tasks``.
          train: Whether routers are noisy.

        Returns:
          The features of each patch, in their grid.

        Raises:
          ValueError: If the task is missing, or the sizes do not fit.
        """
        if self.num_tasks is not None and task is None:
            raise ValueError("a trunk with a router a task needs the index of the task")
        x = self.embedding(
            self.width, self.patch_size, dtype=self.dtype, name="embedding"
        )(to_pixels(images, self.num_channels))
        batch, rows, columns, _ = x.shape
        positions = sincos_position_embedding(rows, columns, self.width)
        x = x + jnp.asarray(positions, self.dtype)[None]
        x = x.reshape(batch, rows * columns, self.width)
        # Whether to train (argument 3) decides what is traced: it stays a Python bool.
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for i in range(self.depth):
            x = block(
                num_heads=self.num_heads,
                hidden=self.mlp_ratio * self.width,
                moe=self.moe if i % 2 else None,
                num_tasks=self.num_tasks,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x, task, train)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return x.reshape(batch, rows, columns, self.width)
