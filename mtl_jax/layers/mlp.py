"""The multilayer perceptron of a transformer block, and of one expert."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x·Φ(x) with the normal distribution Φ itself (Hendrycks & Gimpel, 2016)."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x·σ(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Two dense layers with a nonlinearity between them.

    Attributes:
      hidden: Number of hidden units.
      activation: The nonlinearity; by default GELU in its tanh form.
      dtype: Dtype of the computation and the output; parameters are float32.
    """

    hidden: int
    activation: Callable[[Array], Array] = jax.nn.gelu
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
        return down(self.activation(up(rows))).reshape(x.shape)

    @nn.nowrap
    def stages(self):
        """The same as pure functions; see `mtl_jax.layers.moe.experts`."""
        return (
            lambda parameters, rows, linear: linear(rows, parameters["up"]),
            lambda parameters, hidden, linear: linear(
                self.activation(hidden), parameters["down"]
            ),
        )


class SwiGlu(nn.Module):
    """A gated perceptron (Shazeer, "GLU variants improve transformer", 2020).

    Attributes:
      hidden: Hidden units of an `Mlp` that has as many parameters: the layer itself has
        two thirds of them, rounded up to a multiple of 8, as in DINOv2.
      dtype: Dtype of the computation and the output; parameters are float32.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Applies the perceptron to the last axis of ``x``."""
        units = (2 * self.hidden // 3 + 7) // 8 * 8
        kernel_init = nn.initializers.xavier_uniform()
        zeros = nn.initializers.zeros
        gate, up = (
            nn.Dense(
                units,
                dtype=self.dtype,
                kernel_init=nn.with_logical_partitioning(kernel_init, ("embed", "mlp")),
                bias_init=nn.with_logical_partitioning(zeros, ("mlp",)),
                name=name,
            )
            for name in ("gate", "up")
        )
        down = nn.Dense(
            x.shape[-1],
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(kernel_init, ("mlp", "embed")),
            bias_init=nn.with_logical_partitioning(zeros, ("embed",)),
            name="down",
        )
        rows = x.reshape(-1, x.shape[-1])
        return down(jax.nn.silu(gate(rows)) * up(rows)).reshape(x.shape)

    @nn.nowrap
    def stages(self):
        """The same as pure functions; see `mtl_jax.layers.moe.experts`."""
        return (
            lambda parameters, rows, linear: (
                linear(rows, parameters["gate"]),
                linear(rows, parameters["up"]),
            ),
            lambda parameters, hidden, linear: linear(
                jax.nn.silu(hidden[0]) * hidden[1], parameters["down"]
            ),
        )
