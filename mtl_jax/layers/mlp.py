"""The multilayer perceptron of a transformer block, and of one expert."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Mlp(nn.Module):
    """Two dense layers with a GELU between them.

    Attributes:
      hidden: Number of hidden units.
      dtype: Dtype of the computation and the output; parameters are float32.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Applies the perceptron to the last axis of ``x``."""
        kernel_init = nn.initializers.xavier_uniform()
        up = nn.Dense(
            self.hidden,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(kernel_init, ("embed", "mlp")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("mlp",)),
            name="up",
        )
        down = nn.Dense(
            x.shape[-1],
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(kernel_init, ("mlp", "embed")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
            name="down",
        )
        # The CPU multiplies matrices a quarter faster than arrays of more axes.
        rows = x.reshape(-1, x.shape[-1])
        return down(jax.nn.gelu(up(rows))).reshape(x.shape)
