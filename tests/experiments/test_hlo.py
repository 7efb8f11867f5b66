"""Kernels of small programs in XLA's text, counted by hand."""

import pytest

from experiments.benchmarks import hlo

HEADER = "HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}\n\n"

ONE_FUSION = """
%fused_add (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %c = f32[] constant(1)
  %b = f32[4]{0} broadcast(%c), dimensions={}
  ROOT %a = f32[4]{0} add(%p, %b)
}
"""

SCAN = """
%inner_body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[4]{0} get-tuple-element(%arg), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%fused_next
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused_add
  %z = f32[4]{0} copy(%y)
  ROOT %out = (s32[], f32[4]{0}) tuple(%next, %z)
}

%inner_condition (arg.1: (s32[], f32[4])) -> pred[] {
  %arg.1 = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] fusion(%j), kind=kLoop, calls=%fused_less
}
"""


def program(*computations: str) -> hlo.Part:
    return hlo.structure(hlo.parse(HEADER + "".join(computations)))


def test_a_fusion_is_one_kernel_and_what_names_values_is_none() -> None:
    text = """
ENTRY %main (x: f32[4]) -> (f32[4], f32[4]) {
  %x = f32[4]{0:T(256)S(1)} parameter(0), metadata={op_name="x"}
  %c = s32[] constant(3)
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused_add, metadata={op_name="jit(f)/add"}
  %z = f32[2,2]{1,0:T(2,128)} bitcast(%y)
  %gemm = (f32[4]{0}, s8[64]{0}) custom-call(%y, %y), custom_call_target="__cublas$gemm"
  %room = f32[4]{0} custom-call(), custom_call_target="AllocateBuffer"
  %product = f32[4]{0} get-tuple-element(%gemm), index=0
  ROOT %out = (f32[4]{0}, f32[4]{0}) tuple(%y, %product)
}
"""
    assert program(ONE_FUSION, text).total == 2


def test_a_loop_of_known_length_counts_its_trips_and_no_condition() -> None:
    text = """
ENTRY %main (x: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = (s32[], f32[4]{0}) parameter(0)
  ROOT %loop = (s32[], /*index=1*/f32[4]{0}) while(%x), condition=%inner_condition, body=%inner_body, \
metadata={op_name="jit(f)/while"}, backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0"}}
}
"""
    counted = program(ONE_FUSION, SCAN, text)
    [loop] = counted.inner
    assert (loop.kind, loop.op_name, loop.trips, loop.once, loop.check) == ("loop", "jit(f)/while", 7, 3, 0)
    assert counted.total == 7 * 3


NESTED = """
%outer_body (arg.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg.2 = (s32[], f32[4]{0}) parameter(0)
  %before = (s32[], f32[4]{0}) fusion(%arg.2), kind=kLoop, calls=%fused_any
  ROOT %inner = (s32[], f32[4]{0}) while(%before), condition=%inner_condition, body=%inner_body, \
metadata={op_name="jit(f)/while/body/while"}, backend_config={"known_trip_count":{"n":"10"}}
}

%outer_condition (arg.3: (s32[], f32[4])) -> pred[] {
  %arg.3 = (s32[], f32[4]{0}) parameter(0)
  %k = s32[] get-tuple-element(%arg.3), index=0
  %all = pred[] fusion(%arg.3), kind=kInput, calls=%fused_all
  ROOT %and = pred[] fusion(%k, %all), kind=kLoop, calls=%fused_and
}

ENTRY %main (x: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = (s32[], f32[4]{0}) parameter(0)
  %begin = (s32[], f32[4]{0}) fusion(%x), kind=kLoop, calls=%fused_begin
  ROOT %outer = (s32[], f32[4]{0}) while(%begin), condition=%outer_condition, body=%outer_body, \
metadata={op_name="jit(f)/while"}
}
"""


def test_a_loop_of_unknown_length_is_replaced_with_its_condition_and_its_inner_loops() -> None:
    counted = program(ONE_FUSION, SCAN, NESTED)
    [loop] = counted.inner
    assert (loop.trips, loop.once, loop.check) == (None, 1 + 10 * 3, 2)
    seen = []

    def assume(loop: hlo.Part, around: tuple[hlo.Part, ...]) -> tuple[str, int]:
        seen.append((loop.op_name, [part.kind for part in around]))
        return "blocks", 5

    longest = hlo.with_trips(counted, assume)
    assert seen == [("jit(f)/while", ["block"])]
    assert longest.total == 1 + 5 * 31 + 6 * 2  # the condition is evaluated once more than the body
    assert list(longest.lines()) == [
        "block: 168 kernels = 168  ",
        "  loop [blocks]: 5 times 31 kernels, 2 to check = 167  jit(f)/while",
        "    loop: 10 times 3 kernels = 30  jit(f)/while/body/while",
    ]


@pytest.mark.parametrize(
    "attributes",
    [
        "branch_computations={%one, %two, %three}",
        "true_computation=%three, false_computation=%one",
    ],
)
def test_the_longest_branch_of_a_conditional_counts(attributes: str) -> None:
    branches = """
%one (a: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} parameter(0)
}

%two (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  ROOT %d = f32[4]{0} fusion(%b), kind=kLoop, calls=%fused_add
}

%three (e: f32[4]) -> f32[4] {
  %e = f32[4]{0} parameter(0)
  %g = f32[4]{0} fusion(%e), kind=kLoop, calls=%fused_add
  ROOT %h = f32[4]{0} sort(%g), dimensions={0}, to_apply=%compare
}
"""
    text = f"""
ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  %index = s32[] fusion(%x), kind=kInput, calls=%fused_index
  ROOT %chosen = f32[4]{{0}} conditional(%index, %x, %x, %x), {attributes}, metadata={{op_name="jit(f)/cond"}}
}}
"""
    counted = program(ONE_FUSION, branches, text)
    assert [part.kind for part in counted.inner] == ["choice"]
    assert counted.total == 1 + 2


def test_calls_and_asynchronous_operations_are_followed() -> None:
    text = """
%command_buffer (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused_add
  ROOT %c = f32[4]{0} fusion(%b), kind=kLoop, calls=%fused_add
}

%wrapped (d: f32[4]) -> f32[4] {
  %d = f32[4]{0} parameter(0)
  ROOT %e = f32[4]{0} custom-call(%d), custom_call_target="__cublas$gemm"
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %called = f32[4]{0} call(%x), to_apply=%command_buffer
  %start = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%called), calls=%wrapped
  %moved = (f32[4]{0:S(1)}, f32[4]{0}, u32[]) copy-start(%called)
  %moved.1 = f32[4]{0:S(1)} copy-done(%moved)
  %later = ((f32[4]{0}), f32[4]{0}, u32[]) async-update(%start), calls=%wrapped
  %done = f32[4]{0} async-done(%later), calls=%wrapped
  %sliced = ((f32[4]{0}), f32[2]{0}, u32[]) slice-start(%done), slice={[0:2]}
  %sliced.1 = f32[2]{0} slice-done(%sliced)
  ROOT %out = f32[4]{0} copy(%done)
}
"""
    assert program(ONE_FUSION, text).total == 2 + 1 + 1 + 1 + 1


def counter_loop(condition: str, begin: str = "%zero = s32[] constant(0)", after: str = "add(%i, %by)") -> str:
    """Returns a program as for a TPU: its loops have no number of trips."""
    return f"""
%body (arg: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {{
  %arg = (s32[]{{:T(128)}}, f32[4]{{0}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%arg), index=0
  %x = f32[4]{{0}} get-tuple-element(%arg), index=1
  %n = s32[] get-tuple-element(%arg), index=2
  %by = s32[] constant(2)
  %next = s32[]{{:T(128)}} {after}
  %y = f32[4]{{0}} fusion(%x), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], f32[4]{{0}}, s32[]) tuple(%next, %y, %n)
}}

%condition (arg.1: (s32[], f32[4], s32[])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant(8)
  %arg.1 = (s32[]{{:T(128)}}, f32[4]{{0}}, s32[]) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  %m = s32[] get-tuple-element(%arg.1), index=2
  ROOT %less = pred[]{{:T(512)}} {condition}
}}

ENTRY %main (x: f32[4], s: s32[]) -> (s32[], f32[4], s32[]) {{
  %x = f32[4]{{0}} parameter(0)
  %s = s32[] parameter(1)
  %twenty = s32[] constant(20)
  {begin}
  %begin = s32[]{{:T(128)}} copy(%zero)
  %first = (s32[], f32[4]{{0}}, s32[]) tuple(%begin, %x, %twenty)
  ROOT %loop = (s32[], f32[4]{{0}}, s32[]) while(%first), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (counter_loop("compare(%j, %bound), direction=LT", after="fusion(%i), kind=kLoop, calls=%fused_next"), 8),
        (counter_loop("compare(%j, %bound), direction=LT"), 4),
        (counter_loop("compare(%j, %m), direction=LT"), 10),
        (counter_loop("compare(%j, %bound), direction=LT", begin="%zero = s32[] constant(3)"), 3),
        (counter_loop("compare(%j, %bound), direction=LT", begin="%zero = s32[] add(%s, %s)"), None),
        (counter_loop("compare(%j, %bound), direction=NE"), None),
        (counter_loop("and(%j, %bound)"), None),
    ],
)
def test_the_trips_of_a_loop_are_found_in_its_counter_where_xla_has_not_noted_them(text: str, trips: int) -> None:
    [loop] = program(ONE_FUSION, text).inner
    assert loop.trips == trips


def test_the_scalar_unit_of_a_tpu_executes_no_kernels() -> None:
    text = """
ENTRY %main (x: f32[4], s: s32[]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %s = s32[]{:T(128)} parameter(1)
  %t = s32[]{:T(128)} add(%s, %s)
  %u = s32[]{:T(128)} fusion(%t), kind=kLoop, calls=%fused_next
  ROOT %v = f32[4]{0} add(%x, %x)
}
"""
    computations = hlo.parse(HEADER + ONE_FUSION + text)
    assert hlo.structure(computations).total == 3
    assert hlo.structure(computations, scalars_are_free=True).total == 2


def test_a_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse(HEADER)


ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |u8[64,64]| at ShapeIndex {}:
 value: <1 x @0> (size=4096,offset=0): u8[64,64]{1,0}
allocation 1: size 99, preallocated-temp:
 value: <2 small @0> (size=16,offset=4096): f32[4]{0}
 value: <3 y{} @0> (size=4096,offset=0): u8[1,64,64]{2,1,0:T(8,128)(4,1)}
 value: <4 again @0> (size=4096,offset=0): u8[1,64,64]{2,1,0}
 value: <5 pair{} @0> (size=16,offset=4160): (f32[4]{0}, f32[4]{0})
 value: <7 moved @0> (size=64,offset=8192): f32[16]{0}
 value: <8 added @0> (size=64,offset=8192): f32[16]{0}
allocation 2: size 8192, color 1, preallocated-temp:
 value: <6 on_chip @0> (size=8192,offset=0): f32[2048]{0:T(1024)S(1)}
"""


def test_temporaries_are_listed_by_size_with_the_names_of_their_operations() -> None:
    text = """
ENTRY %main (x: u8[64,64]) -> u8[64,64] {
  %x = u8[64,64]{1,0} parameter(0)
  %y = u8[1,64,64]{2,1,0} copy(%x), metadata={op_name="jit(f)/copy"}
  %added = f32[16]{0} fusion(%x), kind=kLoop, calls=%fused_add, metadata={op_name="jit(f)/add"}
  %moved = f32[16]{0} copy(%added)
  ROOT %z = u8[64,64]{1,0} bitcast(%y)
}
"""
    found = hlo.temporaries(ASSIGNMENT, hlo.parse(HEADER + text))
    assert found == [
        hlo.Buffer(4096, "u8[1,64,64]", "y", "jit(f)/copy"),
        hlo.Buffer(64, "f32[16]", "moved", "copy of added"),
        hlo.Buffer(16, "f32[4]", "small", ""),
    ]
    assert [(buffer.num_elements, buffer.num_bytes) for buffer in found] == [(4096, 4096), (16, 64), (4, 16)]
    assert hlo.Buffer(1, "pred[3,3]", "", "").num_bytes == 9
    assert hlo.Buffer(1, "f32[]", "", "").num_elements == 1
