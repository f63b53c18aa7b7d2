"""Floating-point operations of a function, counted from its jaxpr."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
from jax.extend import core

_COUNTED = re.compile(r"flops_times_(\d+)_over_(\d+)")
_STATED = re.compile(r"flops_are_(\d+)")


def counted(function: Callable, times: Fraction) -> Callable:
    """The same function, whose operations `count_flops` multiplies.

    For loops of which only the data say how often they run, and kernels that leave out
    a part of what they are given.

    Args:
      function: Of arrays.
      times: How often its operations are done, at least zero; a mean.
    """
    return _named(function, f"flops_times_{times.numerator}_over_{times.denominator}")


def stated(function: Callable, flops: int) -> Callable:
    """The same function, of which `count_flops` takes ``flops`` without a look inside.

    For kernels that say nothing of themselves. Its derivatives would be taken to cost
    as much, and so would all of it under `jax.vmap`.
    """
    return _named(function, f"flops_are_{flops}")


def _named(function: Callable, name: str) -> Callable:
    def function_of_arrays(*arguments: Any) -> Any:
        return function(*arguments)

    # A function compiled by itself keeps its name when it is differentiated.
    function_of_arrays.__name__ = name
    return jax.jit(function_of_arrays)


def count_flops(jaxpr: core.ClosedJaxpr) -> int:
    """Multiplications and additions in the matrix products and convolutions.

    XLA's own count takes the body of a loop once, however often it runs; this one
    multiplies by the length of each ``scan``. Of a ``cond`` the most expensive branch
    counts, of a ``while`` one pass, unless `counted` says more. A grouped product
    (``ragged_dot``) takes every row once, whatever a platform makes of it. A Pallas
    kernel counts what it says of itself, or else its body as often as its grid has
    steps of known number. Elementwise operations are left out.

    Args:
      jaxpr: What `jax.make_jaxpr` or the ``jaxpr`` of a traced function gives.

    Returns:
      The number of operations over all devices.
    """
    return round(_count(jaxpr.jaxpr))


def _count(jaxpr: core.Jaxpr) -> Fraction:
    used, total = set(map(id, jaxpr.outvars)), Fraction(0)
    for equation in reversed(jaxpr.eqns):
        # Compilers leave out what nobody uses, such as the value of a function of which
        # only the transpose is wanted.
        if equation.effects or not used.isdisjoint(map(id, equation.outvars)):
            used.update(map(id, equation.invars))
            total += _count_equation(equation)
    return total


def _count_equation(equation: core.JaxprEqn) -> Fraction | int:
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
    repeats: Fraction | int = parameters["length"] if name == "scan" else 1
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
    if said := _STATED.fullmatch(str(parameters.get("name"))):
        return int(said.group(1))
    if said := _COUNTED.fullmatch(str(parameters.get("name"))):
        repeats = Fraction(*map(int, said.groups()))
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
