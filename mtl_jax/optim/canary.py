"""A quick check that the installed JAX computes task gradients rightly."""

from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

# The known fault shows from 4096 task rows on; smaller checks pass in spite of it.
_NUM_TASKS, _NUM_ROWS, _WIDTH = 4, 2048, 64


def check_task_gradients(batch: Callable[[Callable], Callable] = jax.vmap) -> None:
    """Refuse to go on where this JAX release gets stacked task gradients wrong.

    One release (0.10.2) silently returns wrong gradients on the CPU, for all tasks but
    the first, when the pullback of a normalisation is mapped over tasks. This pulls
    four cotangents back through an RMSNorm of 2048 rows of width 64, mapped and one by
    one, on the default device, and compares. Takes about half a second, most of it
    compilation.

    Args:
        batch: Turns a pullback of one cotangent into one of a stack of them.

    Raises:
        RuntimeError: If the two disagree.
    """
    shape = (1 + _NUM_TASKS, _NUM_ROWS, _WIDTH)
    inputs, *cotangents = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def pull_back(inputs: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(_normalize, inputs, jnp.ones(_WIDTH))[1](cotangent)

    def pull_back_all(inputs: jax.Array, cotangents: jax.Array) -> tuple:
        return batch(jax.vjp(_normalize, inputs, jnp.ones(_WIDTH))[1])(cotangents)

    together = jax.jit(pull_back_all)(inputs, np.stack(cotangents))
    single = jax.jit(pull_back)
    one_by_one = [single(inputs, cotangent) for cotangent in cotangents]
    for task, expected in enumerate(one_by_one):
        for result, reference in zip(together, expected, strict=True):
            reference = np.asarray(reference)
            size = np.max(np.abs(reference))
            error = np.max(np.abs(np.asarray(result)[task] - reference))
            if not error <= 1e-3 * size:
                jaxlib_version = metadata.version("jaxlib")
                raise RuntimeError(
                    f"jax {jax.__version__} with jaxlib {jaxlib_version} computes "
                    f"wrong task gradients (task {task} is off by {error / size:.0%}); "
                    "install another release: pip install 'jax!=0.10.2'."
                )


def _normalize(inputs: jax.Array, scale: jax.Array) -> jax.Array:
    mean_square = jnp.mean(inputs * inputs, axis=-1, keepdims=True)
    return inputs * jax.lax.rsqrt(mean_square + 1e-6) * scale[None, :]
