"""Optax chains with a schedule over a run of known length."""

import jax
import optax


def adamw(
    num_steps: int,
    *,
    learning_rate: float = 1e-3,
    warmup_fraction: float = 0.05,
    weight_decay: float = 0.05,
    b2: float = 0.999,
    eps: float = 1e-8,
    max_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to 0 and clipping by global norm.

    Weight decay leaves out biases, scales of normalisations and any other parameter
    of a single axis. The learning rate in use is in the state under
    ``learning_rate``.

    Args:
      num_steps: Length of the run.
      learning_rate: Peak learning rate.
      warmup_fraction: Part of the run that the warm-up takes.
      weight_decay: Decoupled weight decay (Loshchilov & Hutter, 2019).
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      max_norm: Global norm to clip the aggregated gradient to; None for no clipping.

    Returns:
      The chain.

    Raises:
      ValueError: If a number is out of its range.
    """
    for name, value, holds, bounds in (
        ("learning_rate", learning_rate, learning_rate >= 0, "at least 0"),
        (
            "warmup_fraction",
            warmup_fraction,
            0 <= warmup_fraction <= 1,
            "at least 0 and at most 1",
        ),
        ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
        ("b2", b2, 0 <= b2 < 1, "at least 0 and less than 1"),
        ("eps", eps, eps > 0, "greater than 0"),
        (
            "max_norm",
            max_norm,
            max_norm is None or max_norm > 0,
            "greater than 0, or None",
        ),
    ):
        if not holds:
            raise ValueError(f"optimizer.{name} is {value}; it must be {bounds}")
    warmup = max(1, round(warmup_fraction * num_steps))
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup, max(num_steps, warmup + 1)
    )
    clip = optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)
    return optax.chain(
        clip,
        optax.inject_hyperparams(
            optax.adamw, static_args=("b1", "b2", "eps", "weight_decay", "mask")
        )(
            learning_rate=schedule,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=_decayed,
        ),
    )


def sgd(
    num_steps: int,
    *,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    power: float = 0.9,
    max_norm: float | None = None,
) -> optax.GradientTransformation:
    """SGD with momentum and a polynomial decay to 0.

    The learning rate is ``learning_rate * (1 - step / num_steps) ** power``, and in the
    state under ``learning_rate``. Weight decay is added to the gradient of every
    parameter, as in PyTorch, so that it goes through the momentum.

    Args:
      num_steps: Length of the run.
      learning_rate: Initial learning rate.
      momentum: Decay of the sum of gradients.
      weight_decay: Times the parameters, what is added to their gradients.
      power: Exponent of the decay.
      max_norm: Global norm to clip the aggregated gradient to; None for no clipping.

    Returns:
      The chain.

    Raises:
      ValueError: If a number is out of its range.
    """
    for name, value, holds, bounds in (
        ("learning_rate", learning_rate, learning_rate >= 0, "at least 0"),
        ("momentum", momentum, 0 <= momentum < 1, "at least 0 and less than 1"),
        ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
        ("power", power, power > 0, "greater than 0"),
        (
            "max_norm",
            max_norm,
            max_norm is None or max_norm > 0,
            "greater than 0, or None",
        ),
    ):
        if not holds:
            raise ValueError(f"optimizer.{name} is {value}; it must be {bounds}")
    schedule = optax.schedules.polynomial_schedule(
        learning_rate, 0.0, power, max(num_steps, 1)
    )
    clip = optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)
    return optax.chain(
        clip,
        optax.add_decayed_weights(weight_decay),
        optax.inject_hyperparams(optax.sgd, static_args=("momentum", "nesterov"))(
            learning_rate=schedule, momentum=momentum
        ),
    )


def _decayed(params: optax.Params) -> optax.Params:
    # Biases of experts and of stacked heads have several axes: their names tell.
    # Behind the name may come the box of a parameter that carries its logical axes.
    def decays(path: tuple, leaf: jax.Array) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return leaf.ndim > 1 and names[-1:] not in (["bias"], ["scale"])

    return jax.tree_util.tree_map_with_path(decays, params)
