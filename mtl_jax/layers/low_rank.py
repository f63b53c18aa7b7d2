"""A map of low rank: the smallest of experts."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class LowRank(nn.Module):
    """A linear map through few units, ``scale · x A B``, without bias.

    As an expert, by ``MoE(expert=LowRank, expert_hidden=rank, ...)``, it is so small
    that a mixture of many costs less than one perceptron. The experts of MLoRE (Yang et
    al., 2024) are such pairs. With ``up_init`` zero it is what LoRA (Hu et al., 2022)
    adds to a layer, which is nothing at first.

    Attributes:
      hidden: The rank.
      scale: Factor of the result; LoRA's is ``alpha / rank``.
      up_init: Initialiser of ``B``. ``A`` is uniform, of variance ``1 / width``.
      dtype: Dtype of the computation and the output; parameters are float32.
    """

    hidden: int
    scale: float = 1.0
    up_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Applies the map to the last axis of ``x``."""
        down = nn.Dense(
            self.hidden,
            use_bias=False,
            dtype=self.dtype,
            # Too small to be worth splitting, so its units have no axis to split over.
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_uniform(), ("embed", None)
            ),
            name="down",
        )
        up = nn.Dense(
            x.shape[-1],
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(self.up_init, (None, "embed")),
            name="up",
        )
        return self.scale * up(down(x))

    @nn.nowrap
    def stages(self):
        """The same as pure functions; see `mtl_jax.layers.moe.experts`."""
        return (
            lambda parameters, rows, linear: linear(rows, parameters["down"]),
            lambda parameters, units, linear: (
                self.scale * linear(units, parameters["up"])
            ),
        )
