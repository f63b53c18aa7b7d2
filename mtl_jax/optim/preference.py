"""How much each task counts, for methods that take a preference among them."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Preference = Sequence[float] | Float[Array, " tasks"]


def task_preference(
    preference: Preference | None, active: Bool[Array, " tasks"], dtype: jnp.dtype
) -> Float[Array, " tasks"]:
    """Share a preference among the tasks that are present.

    Args:
        preference: One nonnegative number a task; `1/K` for each if None.
        active: Which tasks are present.
        dtype: Of the result.

    Returns:
        The preference, 0 for inactive tasks, and the sum that it has for all tasks
        spread over the active ones in proportion.
    """
    if preference is None:
        return active.astype(dtype) / jnp.maximum(jnp.sum(active), 1).astype(dtype)
    wanted = jnp.asarray(preference, dtype)
    present = jnp.where(active, wanted, 0)
    total = jnp.sum(present)
    return present * (jnp.sum(wanted) / jnp.where(total > 0, total, 1))


def check_preference(preference: Sequence[float] | None, num_tasks: int) -> None:
    """Raise ValueError unless there is one number a task, none negative, not all 0."""
    if preference is None:
        return
    valid = all(math.isfinite(value) and value >= 0 for value in preference)
    if len(preference) != num_tasks or not valid or not any(preference):
        raise ValueError(
            f"preference is {tuple(preference)}; pass {num_tasks} numbers, one a task, "
            "none negative and not all 0."
        )
