"""Checks of what layers of experts are given, before anything is computed."""

import math
import numbers

from jaxtyping import Array, Float


def check_tokens(x: Float[Array, "..."]) -> None:
    """Checks that there are tokens of a batch of examples.

    Args:
      x: The layer's input.

    Raises:
      ValueError: If it has not three axes, or one of length 0.
    """
    if x.ndim != 3:
        raise ValueError(
            f"x has shape {x.shape}, but the axes must be [batch, tokens, width]; "
            "give a single example as a batch of 1."
        )
    if 0 in x.shape:
        raise ValueError(
            f"x has shape {x.shape}, which leaves nothing to route; give at least one "
            "example of one token, or do not call the layer."
        )


def check_condition(condition: Float[Array, "..."] | None, batch: int) -> None:
    """Checks that there is one condition for each example, or none at all.

    Args:
      condition: What examples are routed by, or None.
      batch: Number of examples.

    Raises:
      ValueError: If its shape is not ``[batch, features]``.
    """
    if condition is not None and (condition.ndim != 2 or len(condition) != batch):
        raise ValueError(
            f"condition has shape {condition.shape}, but x has a batch of {batch}; "
            f"give one vector an example, [{batch}, features]."
        )


def check_integer(field: str, value: int) -> None:
    """Checks that a field is an integer, as shapes need it.

    Args:
      field: Its name.
      value: Its value.

    Raises:
      ValueError: If it is another number, or none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(
            f"{field}={value!r} is not an integer; give a whole number without a point."
        )


def check_selected(field: str, selected: int, num_experts: int) -> None:
    """Checks that there are experts, and enough for every token.

    Args:
      field: Name of the field that says how many a token goes to.
      selected: Its value.
      num_experts: Number of experts.

    Raises:
      ValueError: If there is no expert, or a token goes to none or to more than all;
        or if one of the numbers is no integer.
    """
    check_integer("num_experts", num_experts)
    check_integer(field, selected)
    if num_experts < 1:
        raise ValueError(
            f"num_experts={num_experts} leaves the layer without an expert; make it 1 "
            "or more."
        )
    if not 1 <= selected <= num_experts:
        raise ValueError(
            f"{field}={selected} is not between 1 and num_experts={num_experts}, of "
            f"which each token picks so many; change {field}, or have more experts."
        )


def check_capacity_factor(
    capacity_factor: float | None,
    *,
    has_buffers: bool = False,
    field: str = "capacity_factor",
) -> None:
    """Checks that a capacity is a number, or that there is no limit.

    Whether it leaves a router's buffers a slot depends on the tokens, and is checked
    with them. Experts that tokens choose get one by any positive number.

    Args:
      capacity_factor: Slots over what balanced routing needs, or None.
      has_buffers: Whether a router fills buffers of that capacity, which needs one.
      field: Name of the field that says it.

    Raises:
      ValueError: If it is infinite or not a number; or, where there are buffers, None,
        and where there are none, not positive.
    """
    if capacity_factor is None and not has_buffers:
        return
    otherwise = "" if has_buffers else ", or None for experts that take every token"
    if not isinstance(capacity_factor, numbers.Real) or not math.isfinite(
        capacity_factor
    ):
        raise ValueError(
            f"{field}={capacity_factor} is not a finite number; make it "
            f"positive{otherwise}."
        )
    if capacity_factor <= 0 and not has_buffers:
        raise ValueError(
            f"{field}={capacity_factor} gives experts no slot; make it "
            f"positive{otherwise}."
        )


def check_num_slots(
    num_slots: int, num_tokens: int, num_experts: int, capacity_factor: float
) -> None:
    """Checks that experts have a slot.

    Args:
      num_slots: Slots of each expert.
      num_tokens: Tokens of a group.
      num_experts: Number of experts.
      capacity_factor: What ``num_slots`` follows from.

    Raises:
      ValueError: If there is none.
    """
    if num_slots < 1:
        raise ValueError(
            f"capacity_factor={capacity_factor} gives each of {num_experts} experts no "
            f"slot for {num_tokens} tokens; with {num_experts / num_tokens:g} each has "
            "one."
        )
