"""Elementwise losses: each returns values and which of them are labelled.

An integer target of -1 and a floating-point target of NaN carry no label. The mean
over the labelled elements of a whole (global) batch is taken by the objective, so no
loss depends on how a batch is split over devices.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

LossTerms = tuple[Float[Array, " *shape"], Bool[Array, " *shape"]]


def labelled(target: Array) -> Bool[Array, " *shape"]:
    """Which elements of ``target`` carry a label: not -1, not NaN."""
    if target.dtype == jnp.bool_:
        return jnp.ones_like(target)
    if jnp.issubdtype(target.dtype, jnp.integer):
        return target >= 0
    return ~jnp.isnan(target)


def softmax_cross_entropy(
    prediction: Float[Array, "*shape classes"], target: Int[Array, " *shape"]
) -> LossTerms:
    """Negative log-likelihood of integer classes, in nats, in float32.

    Args:
      prediction: Logits.
      target: Class of each element, -1 where unlabelled.

    Returns:
      The loss of each element (0 where unlabelled) and the mask of labelled ones.
    """
    valid = labelled(target)
    values = optax.losses.softmax_cross_entropy_with_integer_labels(
        prediction.astype(jnp.float32), jnp.where(valid, target, 0)
    )
    return jnp.where(valid, values, 0.0), valid


def squared_error(
    prediction: Float[Array, " *shape"], target: Float[Array, " *shape"]
) -> LossTerms:
    """Half the squared difference, in float32.

    Args:
      prediction: Predicted values.
      target: True values, NaN where unlabelled.

    Returns:
      The loss of each element (0 where unlabelled) and the mask of labelled ones.
    """
    error, valid = _error(prediction, target)
    return 0.5 * jnp.square(error), valid


def huber(
    prediction: Float[Array, " *shape"],
    target: Float[Array, " *shape"],
    delta: float = 1.0,
) -> LossTerms:
    """The Huber loss: squared within ``delta``, absolute beyond it, in float32.

    Args:
      prediction: Predicted values.
      target: True values, NaN where unlabelled.
      delta: Error, in units of the target, at which the loss turns linear.

    Returns:
      The loss of each element (0 where unlabelled) and the mask of labelled ones.
    """
    error, valid = _error(prediction, target)
    return optax.losses.huber_loss(error, delta=delta), valid


def _error(prediction: Array, target: Array) -> tuple[jax.Array, jax.Array]:
    valid = labelled(target)
    known = jnp.where(valid, target, 0.0).astype(jnp.float32)
    return jnp.where(valid, prediction.astype(jnp.float32) - known, 0.0), valid
