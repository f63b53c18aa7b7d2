"""Heads: trunk features to predictions."""

import flax.linen as nn
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
