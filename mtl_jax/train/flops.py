"""Floating-point operations of a function, counted from its jaxpr."""

import math
from typing import Any

from jax.extend import core


def count_flops(jaxpr: core.ClosedJaxpr) -> int:
    """Multiplications and additions in the matrix products and convolutions.

    XLA's own count takes the body of a loop once, however often it runs; this one
    multiplies by the length of each ``scan``. Of a ``cond`` the most expensive branch
    counts, of a ``while`` one pass. A grouped product (``ragged_dot``) takes every row
    once, whatever a platform makes of it. A Pallas kernel counts what it says of
    itself, or else its body as often as its grid has steps of known number. Elementwise
    operations are left out.

    Args:
      jaxpr: What `jax.make_jaxpr` or the ``jaxpr`` of a traced function gives.

    Returns:
      The number of operations over all devices.
    """
    return _count(jaxpr.jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = _shape(equation.invars[0])
        depth = math.prod(left[axis] for axis in contracted)
        return 2 * depth * math.prod(_shape(equation.outvars[0]))
    if name == "ragged_dot_general":
        numbers = parameters["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        taken = {*contracted, *batch, *numbers.rhs_group_dimensions}
        right = _shape(equation.invars[1])
        columns = math.prod(n for axis, n in enumerate(right) if axis not in taken)
        return 2 * math.prod(_shape(equation.invars[0])) * columns
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        size = math.prod(_shape(equation.outvars[0]))
        return 2 * size * math.prod(kernel) // outputs
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in parameters["branches"])
    repeats = parameters["length"] if name == "scan" else 1
    if name == "pallas_call":
        if (estimate := parameters["cost_estimate"]) is not None:
            return estimate.flops
        grid = parameters["grid_mapping"].grid
        repeats = math.prod(size for size in grid if isinstance(size, int))
    if name == "shard_map":
        # JAX 0.10 says manual_axes, later releases newly_manual_axes.
        names = ("newly_manual_axes", "manual_axes")
        axes = next(parameters[name] for name in names if name in parameters)
        repeats = math.prod(parameters["mesh"].shape[axis] for axis in axes)
    return repeats * sum(_count(inner) for inner in _inner(parameters))


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(parameters: dict) -> list[core.Jaxpr]:
    found = []
    for value in parameters.values():
        values = value if isinstance(value, tuple | list) else [value]
        for item in values:
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
