"""Traffic with the memory, byte by byte."""

import pytest

from mtl_jax.scaling.hlo import ArrayType, parse
from mtl_jax.scaling.traffic import memory_bytes, padded_bytes


# Tiles fill the innermost axes: 3 x 5 becomes 8 x 128; where axis 0 is innermost, 5 x 3
# does. A tile of one side pads the innermost axis alone.
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (ArrayType("f32", (3, 5), "1,0:T(8,128)"), 8 * 128 * 4),
        (ArrayType("f32", (2, 200, 9), "1,2,0:T(8,128)"), 2 * 16 * 256 * 4),
        (ArrayType("bf16", (16, 128), "1,0:T(8,128)(2,1)"), 16 * 128 * 2),
        (ArrayType("f32", (100,), "0:T(128)"), 128 * 4),
        (ArrayType("f32", (3, 5), "1,0"), 60),
        (ArrayType("f32", (), ":T(128)"), 4),
    ],
)
def test_tiles_are_filled(array, expected):
    assert padded_bytes(array) == expected


def traffic(lines, computations=""):
    return memory_bytes(
        parse(f"""
{computations}
ENTRY %main (x: f32[4,8], i: s32[]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
{lines}
}}
""")
    )


X, ROW, INDEX = 4 * 8 * 4, 8 * 4, 4


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("  ROOT %y = f32[4,8]{1,0} add(%x, %x)", 3 * X),
        ("  ROOT %y = f32[32]{0} bitcast(%x)", 0),
        # On the chip: only x is read.
        ("  ROOT %y = f32[4,8]{1,0:S(1)} negate(%x)", X),
        ("  ROOT %y = f32[1,8]{1,0} dynamic-slice(%x, %i, %i)", 2 * ROW + 2 * INDEX),
        (
            "  %row = f32[1,8]{1,0} slice(%x), slice={[0:1], [0:8]}\n"
            "  ROOT %y = f32[4,8]{1,0} dynamic-update-slice(%x, %row, %i, %i)",
            2 * ROW + 2 * ROW,
        ),
        ('  ROOT %y = f32[4,8]{1,0} custom-call(), custom_call_target="Allocate"', 0),
    ],
)
def test_instructions(lines, expected):
    assert traffic(lines) == expected


FUSED = """
%add_one_row (a: f32[4,8], b: f32[4,8], k: s32[]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %row = f32[1,8]{1,0} dynamic-slice(%b, %k, %k)
  %wide = f32[4,8]{1,0} broadcast(%row), dimensions={0,1}
  ROOT %sum = f32[4,8]{1,0} add(%a, %wide)
}

%set_row (a.1: f32[4,8], b.1: f32[1,8], k.1: s32[]) -> f32[4,8] {
  %a.1 = f32[4,8]{1,0} parameter(0)
  %b.1 = f32[1,8]{1,0} parameter(1)
  %k.1 = s32[] parameter(2)
  ROOT %set = f32[4,8]{1,0} dynamic-update-slice(%a.1, %b.1, %k.1, %k.1)
}

%meanwhile (a.2: f32[4,8], b.2: f32[4,8]) -> (f32[4,8], f32[4,8]) {
  %a.2 = f32[4,8]{1,0} parameter(0)
  %b.2 = f32[4,8]{1,0} parameter(1)
  %gathered = f32[4,8]{1,0} all-gather(%b.2), channel_id=1, replica_groups=[1,2]<=[2]
  %negated = f32[4,8]{1,0} negate(%a.2)
  ROOT %both = (f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%negated, %gathered)
}
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # All of a, one row of b, the index, and the result.
        ("f32[4,8]{1,0} fusion(%x, %x, %i), calls=%add_one_row", 2 * X + ROW + INDEX),
        # The row is read and written; the other rows stay where they are.
        ("f32[4,8]{1,0} fusion(%x, %row, %i), calls=%set_row", 2 * ROW + INDEX),
        # What the collective passes on belongs to the collective.
        ("(f32[4,8], f32[4,8]) fusion(%x, %x), calls=%meanwhile", 2 * X),
    ],
)
def test_fusions_touch_memory_at_their_borders_only(line, expected):
    row = "  %row = f32[1,8]{1,0} constant({...})\n"
    assert traffic(f"{row}  ROOT %y = {line}", FUSED) == expected


def test_what_is_copied_to_the_chip_meanwhile_is_read_once():
    lines = (
        "  %s = ((f32[4,8]{1,0}), f32[1,8]{1,0:S(1)}, s32[]) slice-start(%x), "
        "slice={[0:1], [0:8]}\n"
        "  %part = f32[1,8]{1,0:S(1)} slice-done(%s)\n"
        "  %c = (f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%x)\n"
        "  ROOT %y = f32[4,8]{1,0:S(1)} copy-done(%c)"
    )
    assert traffic(lines) == ROW + X
