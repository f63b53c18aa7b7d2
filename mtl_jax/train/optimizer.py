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
    max_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to 0 and clipping by global norm.

    Weight decay leaves out parameters of a single axis. The learning rate in use
    is in the state under ``learning_rate``.

    Args:
      num_steps: Length of the run.
      learning_rate: Peak learning rate.
      warmup_fraction: Part of the run that the warm-up takes.
      weight_decay: Decoupled weight decay (Loshchilov & Hutter, 2019).
      b2: Decay of the second moment.
      max_norm: Global norm to clip the aggregated gradient to; None for no clipping.

    Returns:
      The chain.
    """
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
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
