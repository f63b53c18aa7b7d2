"""Reading compiled programs: by hand, and one whose loop is known."""

import jax
import jax.numpy as jnp
import pytest

from mtl_jax.scaling import hlo

# As XLA for TPU prints it: no trip count at the loop; layouts with tiles.
LOOP = """
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %reduced = f32[4,8]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%sum
  ROOT %out = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%next, %reduced)
}

%condition (state.1: (s32[], f32[4,8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=DIRECTION
}

ENTRY %main (x.1: f32[4,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %first = s32[]{:T(128)} constant(FIRST)
  %begin = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%first, %x.1)
  %loop = (s32[], f32[4,8]{1,0}) while(%begin), condition=%condition, body=%body
  ROOT %result = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def loop(first=0, limit=10, direction="LT"):
    text = LOOP.replace("FIRST", str(first)).replace("LIMIT", str(limit))
    return hlo.parse(text.replace("DIRECTION", direction))


def times(module, name):
    (visit,) = [v for v in hlo.visits(module) if v.instruction.name == name]
    return visit.times


# The counter goes up by 2: 0 2 4 6 8; 3 5 7 9; 0 2 4 6 8 10; 1 3 5 7 9 11 (of 12).
@pytest.mark.parametrize(
    ("first", "limit", "direction", "expected"),
    [(0, 10, "LT", 5), (3, 10, "LT", 4), (0, 10, "LE", 6), (1, 12, "LT", 6)],
)
def test_the_trip_count_follows_from_first_value_limit_and_step(
    first, limit, direction, expected
):
    module = loop(first, limit, direction)
    assert times(module, "reduced") == expected
    assert times(module, "loop") == 1


def test_instructions_are_read_with_types_operands_and_attributes():
    module = loop()
    assert module.entry == "main"
    reduced = module.computations["body"]["reduced"]
    assert reduced.opcode == "all-reduce"
    assert reduced.operands == ("x",)
    assert reduced.types == (hlo.ArrayType("f32", (4, 8), "1,0:T(8,128)"),)
    assert reduced.bytes == 4 * 8 * 4
    assert reduced.called("to_apply") == "sum"
    assert module.computations["body"]["out"].is_root
    assert not reduced.is_root


def test_a_loop_whose_end_depends_on_values_counts_once():
    text = LOOP.replace("constant(LIMIT)", "get-tuple-element(%state.1), index=0")
    text = text.replace("FIRST", "0").replace("DIRECTION", "LT")
    assert times(hlo.parse(text), "reduced") == 1


@pytest.mark.parametrize(
    ("text", "size", "in_memory"),
    [
        ("f32[3,5]{1,0:T(8,128)}", 60, True),
        ("bf16[4,16]{1,0:T(8,128)(2,1)S(1)}", 128, False),
        ("pred[7]{0:T(512)S(6)}", 7, False),
        ("s4[5]{0}", 3, True),
        ("f8e4m3fn[9]", 9, True),
        ("f32[]", 4, True),
        ("f32[2,<=3]{1,0}", 24, True),
    ],
)
def test_bytes_and_memory_space_of_types(text, size, in_memory):
    (array,) = hlo.array_types(text)
    assert array.bytes == size
    assert array.in_memory is in_memory


def test_a_tuple_type_with_comments_is_read_in_order():
    types = hlo.array_types("(f32[2]{0}, s32[3]{0}, /*index=2*/bf16[4]{0})")
    assert [(t.dtype, t.shape) for t in types] == [
        ("f32", (2,)),
        ("s32", (3,)),
        ("bf16", (4,)),
    ]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing")


def test_loops_in_loops_of_a_program_that_is_compiled_here():
    def inner(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ x), x)

    @jax.jit
    def outer(x):
        return jax.lax.scan(lambda x, _: (inner(x), None), x, None, length=5)[0]

    compiled = outer.lower(jnp.ones((16, 16))).compile()
    module = hlo.parse(compiled.as_text())
    dots = [v.times for v in hlo.visits(module) if v.instruction.opcode == "dot"]
    calls = [
        v.times
        for v in hlo.visits(module)
        if v.instruction.opcode == "custom-call"
        and "matmul" in v.instruction.attributes
    ]
    assert dots + calls == [15]
