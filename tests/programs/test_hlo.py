"""Programs as text: how often loops run, what products cost, what devices send each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from narrowed import present

from jaxquant.programs import schedules
from jaxquant.programs.chips import CHIPS
from jaxquant.programs.costs import collectives, cycles, products, relaid_bytes, unestimated
from jaxquant.programs.hlo import Program, arrays_of

pytestmark = pytest.mark.every

# As a TPU's compiler writes loops: their length is in the condition alone.
LOOP = """HloModule loop, is_scheduled=true

%inner (p: s8[6,64,32]) -> f32[64,32] {
  %p = s8[6,64,32]{2,1,0} parameter(0)
  ROOT %c = f32[64,32]{1,0} convert(%p)
}

%body (t: (s32[], s8[6,64,32])) -> (s32[], s8[6,64,32]) {
  %t = (s32[]{:T(128)}, s8[6,64,32]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %w = s8[6,64,32]{2,1,0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %f = f32[64,32]{1,0:T(8,128)S(1)} fusion(%w), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"100"}
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], s8[6,64,32]{2,1,0}) tuple(%next, %w)
}

%less (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %n = s32[] constant(STOP)
  ROOT %lt = pred[] compare(%a, %n), direction=LT
}

%condition (u: (s32[], s8[6,64,32])) -> pred[] {
  %u = (s32[], s8[6,64,32]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  ROOT %less.1 = pred[] fusion(%j), kind=kLoop, calls=%less
}

ENTRY %main (x: s8[6,64,32]) -> (s32[], s8[6,64,32]) {
  %x = s8[6,64,32]{2,1,0} parameter(0)
  %start = s32[] constant(START)
  %begin = s32[] copy(%start)
  %both = (s32[], s8[6,64,32]{2,1,0}) tuple(%begin, %x)
  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={KNOWN}
  ROOT %loop = (s32[], s8[6,64,32]{2,1,0}) while(%both), condition=%condition, body=%body
}
"""


def loop(start=0, stop=6, known=""):
    return Program(LOOP.replace("START", str(start)).replace("STOP", str(stop)).replace("KNOWN", known))


def test_a_loop_is_as_long_as_its_condition_says():
    program = loop(2, 9)
    assert program.times["body"] == 7
    assert program.times["inner"] == 7
    assert cycles(program) == 700


def test_an_end_that_is_no_constant_is_unknown():
    text = LOOP.replace("%n = s32[] constant(STOP)", "%n = s32[] negate(%a)").replace("START", "0")
    assert np.isnan(Program(text).times["body"])


def test_kernels_have_estimates_only_where_the_schedule_was_kept():
    assert [step.name for step in unestimated(loop())] == ["k"]
    scheduled = loop(known='"bundle_analysis_data":{"estimated_cycles":"50"}')
    assert unestimated(scheduled) == []
    assert cycles(scheduled) == 650


def test_schedules_that_were_found_apart():
    """Each kernel's own, or why it has none, by the name of its instruction."""
    text = LOOP.replace("START", "2").replace("STOP", "7")
    assert not Program(text).has_schedules
    found = Program(text, {"k": 30})
    assert found.has_schedules
    assert unestimated(found) == []
    assert cycles(found) == 5 * 100 + 30
    (step,) = unestimated(Program(text, {"k": "it took too long"}))
    assert step.schedule == "it took too long"


def test_a_schedule_is_no_shorter_than_what_its_kernel_reads():
    """Where the kernel says what it moves; 819 MB take a v5e a millisecond."""
    code = '{"custom_call_config": {"cost_estimate": {"flops": "9", "bytes_accessed": "819000000"}}}'
    for told, schedule, want in ((code, 1000, 1_500_000), (code, 2_000_000, 2_000_000), ("{}", 1000, 1000)):
        assert schedules._no_less_than_read(CHIPS["tpu v5e"], schedules._Kernel((), (), told), schedule) == want
    assert schedules._no_less_than_read(CHIPS["tpu v5e"], schedules._Kernel((), (), code), "none") == "none"


def test_attributes_of_several_lines():
    """As XLA prints the metadata of a kernel. What follows them belongs to the same instruction."""
    lines = 'frontend_attributes={kernel_metadata={\n"tiles":"{\\"rows\\": 512}"\n}}, metadata={op_name="a"}'
    text = LOOP.replace("backend_config={KNOWN}", f'{lines}, backend_config={{"custom_call_config":{{"body":"B"}}}}')
    program = Program(text.replace("START", "0").replace("STOP", "6"))
    kernel = program.computations["main"]["k"]
    assert kernel.config == '{"custom_call_config":{"body":"B"}}'
    assert kernel.attribute("op_name") == '"a"'
    assert list(program.computations["main"]) == ["x", "start", "begin", "both", "k", "loop"]
    assert program.computations["main"]["loop"].rest == ", condition=%condition, body=%body"


def test_no_estimate_is_none():
    """The compiler writes the largest int64 where it has none."""
    program = Program(LOOP.replace('"100"', f'"{2**63 - 1}"').replace("START", "0").replace("STOP", "1"))
    assert cycles(program) is None
    assert "f" in [step.name for step in unestimated(program)]


def test_arrays_that_are_only_brought_to_another_layout():
    """Read and written once a run, in the main memory, unless the compiler has an estimate of the step."""
    step = "%f = f32[64,32]{1,0:T(8,128)S(1)} fusion(%w)"
    moved = LOOP.replace(step, "%f = s8[6,2048]{1,0} reshape(%w)").replace("START", "0").replace("STOP", "5")
    assert relaid_bytes(Program(moved)) == 0  # estimated
    moved = moved.replace('backend_config={"estimated_cycles":"100"}', "metadata={}")
    assert relaid_bytes(Program(moved)) == 5 * 2 * 6 * 2048
    assert relaid_bytes(Program(moved.replace("{1,0} reshape", "{1,0:S(1)} reshape"))) == 5 * 6 * 2048
    assert relaid_bytes(Program(moved.replace(" reshape(", " bitcast("))) == 0


def test_arrays_of_a_type():
    text = "(s4[2,128]{1,0:T(8,128)(8,1)S(1)}, bf16[8]{0}, pred[], f8e4m3fn[16]{0:T(128)S(0)}, u32[]{:S(2)})"
    found = arrays_of(text)
    assert [(a.dtype, a.shape, a.nbytes, a.in_memory) for a in found] == [
        ("s4", (2, 128), 128, False),
        ("bf16", (8,), 16, True),
        ("pred", (), 1, True),
        ("f8e4m3fn", (16,), 16, True),
        ("u32", (), 4, False),
    ]


def compiled(f, *args):
    return Program(present(jax.jit(f).lower(*args).compile().as_text()))


def test_what_a_scan_multiplies():
    def f(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    program = compiled(f, jnp.ones((8, 64)), jnp.ones((5, 64, 64)))
    counted = sum(p.operations * program.times[name] for name, _, p in products(program))
    assert counted == 5 * 2 * 8 * 64 * 64


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 4),
    stride=st.integers(1, 3),
    low=st.integers(-1, 3),
    high=st.integers(0, 3),
    holes=st.integers(1, 3),
    steps=st.integers(1, 2),
)
def test_taps_of_a_convolution(size, stride, low, high, holes, steps):
    """A convolution of ones has one for each multiplication that counts: no padding, nothing that dilation put in."""
    x, w = jnp.ones((1, 3, 7), jnp.float32), jnp.ones((5, 3, size), jnp.float32)
    dilated = (7 - 1) * holes + 1
    if low + high + dilated < (size - 1) * steps + 1:
        return
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, ("NCH", "OIH", "NCH"))
    options = {"lhs_dilation": (holes,), "rhs_dilation": (steps,), "dimension_numbers": numbers}
    out = lax.conv_general_dilated(x, w, (stride,), [(low, high)], **options)
    window = f"size={size} stride={stride} pad={low}_{high} lhs_dilate={holes} rhs_dilate={steps}"
    text = f"""ENTRY %main (x: f32[1,3,7], w: f32[5,3,{size}]) -> f32[1,5,{out.shape[2]}] {{
  %x = f32[1,3,7]{{2,1,0}} parameter(0)
  %w = f32[5,3,{size}]{{2,1,0}} parameter(1)
  ROOT %c = f32[1,5,{out.shape[2]}]{{2,1,0}} convolution(%x, %w), window={{{window}}}, dim_labels=bf0_oi0->bf0
}}
"""
    ((_, _, product),) = products(Program(text))
    assert product.operations == 2 * float(out.sum())
    assert product.dtype == "f32"


def test_transfers():
    text = """ENTRY %main (x: s8[16,8]) -> bf16[64] {
  %x = s8[16,8]{1,0} parameter(0)
  %g = s8[64,8]{1,0} all-gather(%x), dimensions={0}
  %y = bf16[64]{0} convert(%g)
  %s = (bf16[64]{0}, bf16[256]{0}) all-gather-start(%y), dimensions={0}
  %d = bf16[256]{0} all-gather-done(%s)
  ROOT %r = bf16[64]{0} all-reduce(%y), to_apply=%add
}
"""
    found = {(c.kind, c.dtype): (c.nbytes, c.count) for c in collectives(Program(text))}
    assert found == {("all-gather", "s8"): (512, 1), ("all-gather", "bf16"): (512, 1), ("all-reduce", "bf16"): (128, 1)}
