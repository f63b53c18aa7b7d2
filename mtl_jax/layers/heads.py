"""Heads: trunk features to predictions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mtl_jax.layers.patch import unpatchify


class Classification(nn.Module):
    """One class for each image: mean over positions, then a linear map.

    Attributes:
      num_classes: Number of logits.
      dtype: Type that is computed in.
    """

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch rows columns width"]
    ) -> Float[Array, "batch classes"]:
        """Logits of each image."""
        pooled = jnp.mean(features, axis=(1, 2))
        return nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.zeros_init(), ("embed", "classes")
            ),
            name="logits",
        )(pooled)


class DensePrediction(nn.Module):
    """A prediction for each pixel: every token's features to its patch of pixels.

    Attributes:
      patch_size: Side of the patch of a token, in pixels.
      num_classes: Number of logits a pixel, or None for one value a pixel.
      hidden: Width of the hidden layer.
      dtype: Type that is computed in.
    """

    patch_size: int
    num_classes: int | None = None
    hidden: int = 128
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch rows columns width"]
    ) -> Float[Array, "batch height width ..."]:
        """Logits with a last axis ``num_classes``, or values without that axis."""
        x = nn.Dense(
            self.hidden,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), ("embed", "mlp")
            ),
            name="hidden_layer",
        )(features)
        x = nn.gelu(x)
        num_outputs = self.num_classes or 1
        x = nn.Dense(
            self.patch_size**2 * num_outputs,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), ("mlp", None)
            ),
            name="pixels",
        )(x)
        x = unpatchify(x, self.patch_size)
        return x if self.num_classes else x[..., 0]


class UpsamplingHead(nn.Module):
    """A prediction for each pixel by convolutions between doublings of the grid.

    The progressive up-sampling decoder of SETR (Zheng et al., 2021), which is the head
    of M³ViT (Fan et al., 2022): a layer norm; then, for each doubling that leads from
    tokens to pixels, a convolution of 3 x 3, a normalisation, ReLU and bilinear
    interpolation to twice the size. The last interpolation follows a convolution of
    1 x 1 to the outputs.

    The normalisation is over groups of 8 channels, where the published one is over the
    batch: that would depend on which examples share a device and on other tasks'
    examples.

    Attributes:
      patch_size: Side of the patch of a token, in pixels; a power of two, at least 2.
      num_classes: Number of logits a pixel, or None for one value a pixel.
      channels: Channels of the convolutions; a multiple of 8.
      dtype: Type that is computed in.
    """

    patch_size: int
    num_classes: int | None = None
    channels: int = 256
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch rows columns width"]
    ) -> Float[Array, "batch height width ..."]:
        """Logits with a last axis ``num_classes``, or values without that axis.

        Raises:
          ValueError: If ``patch_size`` is no power of two, or ``channels`` no multiple
            of 8.
        """
        doublings = int(math.log2(self.patch_size))
        if doublings < 1 or 2**doublings != self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size}; it must be a power of two, as each "
                "stage doubles the grid"
            )
        if self.channels % 8:
            raise ValueError(
                f"channels is {self.channels}; it must be a multiple of 8, which are "
                "normalised together"
            )
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(features)
        for i in range(doublings):
            x = self._convolution(self.channels, 3, i == 0, f"convolution_{i}")(x)
            x = nn.GroupNorm(
                num_groups=None, group_size=8, dtype=self.dtype, name=f"norm_{i}"
            )(x)
            x = nn.relu(x)
            if i < doublings - 1:
                x = _doubled(x)
        x = self._convolution(self.num_classes or 1, 1, False, "pixels")(x)
        x = _doubled(x)
        return x if self.num_classes else x[..., 0]

    def _convolution(
        self, features: int, side: int, first: bool, name: str
    ) -> nn.Module:
        return nn.Conv(
            features,
            (side, side),
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(),
                (None, None, "embed" if first else None, None),
            ),
            name=name,
        )


def _doubled(
    x: Float[Array, "batch rows columns channels"],
) -> Float[Array, "batch height width channels"]:
    """Bilinear interpolation between the centres of the pixels."""
    batch, rows, columns, channels = x.shape
    return jax.image.resize(x, (batch, 2 * rows, 2 * columns, channels), "bilinear")
