"""Multi-head self-attention."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class SelfAttention(nn.Module):
    """Scaled dot-product attention of a sequence to itself (Vaswani et al., 2017).

    Query, key and value have their own projections; there is neither normalisation
    nor residual inside.

    Attributes:
      num_heads: Number of heads; it must divide the width of the input, unless
        ``head_width`` is given.
      head_width: Width of queries, keys and values; None for the width of the input
        over ``num_heads``.
      qkv_bias: Whether the projections to query, key and value have a bias.
      output_bias: Whether the projection of the attended values has one.
      dtype: Dtype of the computation and the output; parameters are float32.
    """

    num_heads: int
    head_width: int | None = None
    qkv_bias: bool = True
    output_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """Lets every token attend to all tokens of its sequence.

        Raises:
          ValueError: If ``num_heads`` does not divide the width.
        """
        width = x.shape[-1]
        if self.head_width is None and width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide the width {width}; "
                "choose a divisor of the width, or a head_width."
            )
        head_width = self.head_width or width // self.num_heads
        kernel_init = nn.initializers.xavier_uniform()
        zeros = nn.initializers.zeros
        project = functools.partial(
            nn.DenseGeneral,
            features=(self.num_heads, head_width),
            use_bias=self.qkv_bias,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                kernel_init, ("embed", "heads", "kv")
            ),
            bias_init=nn.with_logical_partitioning(zeros, ("heads", "kv")),
        )
        query, key, value = (
            project(name=name)(x) for name in ("query", "key", "value")
        )
        # It takes the softmax in float32 by promoting implicitly.
        with jax.numpy_dtype_promotion("standard"):
            attended = jax.nn.dot_product_attention(query, key, value)
        merge = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            use_bias=self.output_bias,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                kernel_init, ("heads", "kv", "embed")
            ),
            bias_init=nn.with_logical_partitioning(zeros, ("embed",)),
            name="output",
        )
        return merge(attended)
