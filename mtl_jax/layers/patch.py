"""Patches: images to tokens and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def _check_tiles(height: int, width: int, patch_size: int) -> None:
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size is {patch_size}, which does not divide images of "
            f"{height}x{width} pixels"
        )


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
    _check_tiles(height, width, patch_size)
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


def to_pixels(images: Array, num_channels: int) -> Float[Array, "batch h w channels"]:
    """Images as floats of ``num_channels``: bytes in [-1, 1], grey repeated.

    Raises:
      ValueError: If the images have neither one nor ``num_channels`` channels.
    """
    if images.shape[-1] not in (1, num_channels):
        raise ValueError(
            f"images have {images.shape[-1]} channels; this trunk takes 1 or "
            f"{num_channels}"
        )
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(jnp.float32) / 127.5 - 1.0
    return jnp.broadcast_to(images, (*images.shape[:-1], num_channels))


def _cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """What each of ``new`` points in a row takes from ``old`` ones, all equally spaced.

    Keys' cubic convolution (1981) with a = -0.75; points beyond the border are as the
    nearest one within.
    """
    a = -0.75
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    taps = np.floor(centres)[:, None] + np.arange(-1, 3)
    x = np.abs(centres[:, None] - taps)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    weights = np.zeros((new, old))
    taps = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(weights, (np.arange(new)[:, None], taps), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def resize_positions(
    positions: Float[Array, "rows columns width"],
    rows: int,
    columns: int,
    *,
    antialias: bool = False,
) -> Float[Array, "rows columns width"]:
    """Learned position embeddings for a grid of another size, by bicubic interpolation.

    It is what PyTorch's ``interpolate`` does with ``mode="bicubic"`` and corners that
    are not aligned. So ViT, DeiT, DINOv2 and CLIP take images of other sizes in the
    transformers library; DINOv2 with registers, and timm, antialias too.

    Args:
      positions: The embeddings of a grid.
      rows: Height of the new grid.
      columns: Its width.
      antialias: Whether to take out what a smaller grid cannot hold. The kernel is then
        that with a = -0.5, also for a larger grid.

    Returns:
      Those of the new grid; ``positions`` itself if the size is the same.
    """
    if positions.shape[:2] == (rows, columns):
        return positions
    if antialias:
        shape = (rows, columns, positions.shape[2])
        highest = jax.lax.Precision.HIGHEST
        return jax.image.resize(positions, shape, "cubic", precision=highest)
    return jnp.einsum(
        "rh,hwd,cw->rcd",
        _cubic_weights(positions.shape[0], rows),
        positions,
        _cubic_weights(positions.shape[1], columns),
        precision="highest",
    )


class PatchEmbedding(nn.Module):
    """Embeds each patch linearly.

    Pixels come in [-1, 1], which is what ``mean`` and ``std`` are by default. Trunks
    that were trained on pixels normalised otherwise have theirs.

    Attributes:
      width: Channels of a token.
      patch_size: Side of a patch, in pixels.
      use_bias: Whether the linear map has a bias.
      mean: What is subtracted from pixels in [0, 1]: one number, or one a channel.
      std: What they are divided by then.
      dtype: Type that is computed in.
    """

    width: int
    patch_size: int
    use_bias: bool = True
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns width"]:
        """One token for each patch.

        Raises:
          ValueError: If ``mean`` or ``std`` do not fit the channels, or the patches do
            not tile the images.
        """
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, pixels.shape[-1]):
                raise ValueError(
                    f"embedding.{name} is {values}; give one number, or one for each "
                    f"of the {pixels.shape[-1]} channels"
                )
        # In units of pixels from -1 to 1.
        shift, scale = 2 * np.asarray(self.mean) - 1, 2 * np.asarray(self.std)
        if shift.any() or (scale != 1).any():
            pixels = (pixels - _per_channel(shift)) / _per_channel(scale)
        return nn.Dense(
            self.width,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), (None, "embed")
            ),
            name="projection",
        )(patchify(pixels, self.patch_size).astype(self.dtype))


def _per_channel(values: np.ndarray) -> Float[Array, "1 1 1 channels"]:
    return jnp.asarray(values, jnp.float32)[None, None, None]


def _neighbours(
    x: Float[Array, "batch height width channels"], stride: int
) -> list[Float[Array, "batch height/stride width/stride channels"]]:
    """The nine pixels around every ``stride``-th one, zeros beyond the border.

    Products with these are a 3x3 convolution; on CPU its gradient is several times as
    fast as that of XLA's convolution.
    """
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [
        x[:, row : row + height : stride, column : column + width : stride]
        for row in range(3)
        for column in range(3)
    ]


class ConvolutionalStem(nn.Module):
    """Embeds patches by convolutions of stride 2, which learn from fewer examples.

    After Xiao et al., "Early convolutions help transformers see better" (2021), with
    layer norm in place of batch norm: log2(patch_size) convolutions of 3x3 that double
    their channels, then a linear map. Before that map every channel adds a 3x3
    convolution of itself, by which a token knows its neighbours and the border (Chu et
    al., "Conditional positional encodings for vision transformers", 2021).

    Attributes:
      width: Channels of a token.
      patch_size: Side of a patch, in pixels; a power of 2.
      dtype: Type that is computed in.
    """

    width: int
    patch_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns width"]:
        """One token for each patch.

        Raises:
          ValueError: If ``patch_size`` is no power of 2, or the patches do not tile
            the images.
        """
        num_layers = self.patch_size.bit_length() - 1
        if self.patch_size != 2**num_layers or num_layers < 1:
            raise ValueError(
                f"patch_size is {self.patch_size}; a convolutional stem needs a power "
                "of 2"
            )
        height, width = pixels.shape[1:3]
        _check_tiles(height, width, self.patch_size)
        x = pixels.astype(self.dtype)
        for i in range(num_layers):
            x = nn.Dense(
                self.width >> (num_layers - 1 - i),
                dtype=self.dtype,
                kernel_init=nn.with_logical_partitioning(
                    nn.initializers.lecun_normal(), (None, "embed")
                ),
                name=f"convolution_{i}",
            )(jnp.concatenate(_neighbours(x, stride=2), axis=-1))
            x = nn.gelu(nn.LayerNorm(dtype=self.dtype, name=f"norm_{i}")(x))
        kernel = self.param(
            "depthwise",
            nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), (None, "embed")
            ),
            (9, self.width),
        )
        rows = jnp.asarray(kernel, self.dtype)[:, None, None, None]
        for neighbour, row in zip(_neighbours(x, stride=1), rows, strict=True):
            x += neighbour * row
        return nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), (None, "embed")
            ),
            name="projection",
        )(x)
