"""Patches: images to tokens and back."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def patchify(
    images: Float[Array, "batch height width channels"], patch_size: int
) -> Float[Array, "batch rows columns pixels"]:
    """Cuts images into square patches, each flattened to its pixels.

    Args:
      images: Images whose sides are multiples of ``patch_size``.
      patch_size: Side of a patch, in pixels.

    Returns:
      The patches in their grid.

    Raises:
      ValueError: If the patches do not tile the images.
    """
    batch, height, width, channels = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size is {patch_size}, which does not divide images of "
            f"{height}x{width} pixels"
        )
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)


def unpatchify(
    patches: Float[Array, "batch rows columns pixels"], patch_size: int
) -> Float[Array, "batch height width channels"]:
    """The inverse of `patchify`."""
    batch, rows, columns, pixels = patches.shape
    channels = pixels // patch_size**2
    x = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch_size, columns * patch_size, channels)


def sincos_position_embedding(
    rows: int, columns: int, width: int
) -> Float[np.ndarray, "rows columns width"]:
    """Fixed two-dimensional sine-cosine position embedding, for grids of any size.

    Half of the channels encode the row and half the column, at wavelengths from
    2π to 2π·10⁴ (Chen et al., "An empirical study of training self-supervised vision
    transformers", 2021).

    Args:
      rows: Height of the grid.
      columns: Width of the grid.
      width: Number of channels, a multiple of 4.

    Returns:
      The embedding in float32.

    Raises:
      ValueError: If ``width`` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width is {width}; it must be a multiple of 4")
    frequencies = 1e4 ** -(np.arange(width // 4) / (width // 4))
    row_angles = np.arange(rows)[:, None, None] * frequencies
    column_angles = np.arange(columns)[None, :, None] * frequencies
    parts = [
        np.broadcast_to(function(angles), (rows, columns, width // 4))
        for angles in (row_angles, column_angles)
        for function in (np.sin, np.cos)
    ]
    return np.concatenate(parts, axis=-1).astype(np.float32)


class PatchEmbedding(nn.Module):
    """Embeds image patches linearly and adds their positions.

    Images of one channel are repeated to ``num_channels``; bytes are mapped to
    [-1, 1].

    Attributes:
      width: Channels of a token.
      patch_size: Side of a patch, in pixels.
      num_channels: Channels of the widest image.
      dtype: Type that is computed in.
    """

    width: int
    patch_size: int
    num_channels: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Float[Array, "batch rows columns width"]:
        """Tokens of ``images`` ``[batch, height, width, 1 or num_channels]``."""
        if images.shape[-1] not in (1, self.num_channels):
            raise ValueError(
                f"images have {images.shape[-1]} channels; this patch embedding takes "
                f"1 or {self.num_channels}"
            )
        if jnp.issubdtype(images.dtype, jnp.integer):
            images = images.astype(jnp.float32) / 127.5 - 1.0
        shape = (*images.shape[:-1], self.num_channels)
        patches = patchify(jnp.broadcast_to(images, shape), self.patch_size)
        tokens = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), (None, "embed")
            ),
            bias_init=nn.with_logical_partitioning(
                nn.initializers.zeros_init(), ("embed",)
            ),
            name="projection",
        )(patches.astype(self.dtype))
        positions = sincos_position_embedding(*tokens.shape[1:])
        return tokens + jnp.asarray(positions, self.dtype)[None]
