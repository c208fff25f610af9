"""Specs: values that hash, freeze, print briefly and survive JSON; and every combination that has no meaning."""

import dataclasses
import inspect
import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax_settings import needs_jit
from narrowed import untyped

import jaxquant as jq
from jaxquant import OpSpec, PerChannel, PerGroup, PerTensor, QuantError, QuantSpec, Rule
from jaxquant.core.observers import EMA, MSE, AbsMax, Entropy, MinMax, Percentile, WholeRange
from jaxquant.core.qtypes import QTYPES

pytestmark = pytest.mark.every

calibrations = st.one_of(
    st.none(),
    st.sampled_from([AbsMax(), MinMax(), MSE(), Entropy()]),
    st.builds(Percentile, st.floats(51, 100)),
    st.builds(EMA, st.floats(0, 0.99)),
)


@st.composite
def quant_specs(draw, weight=False):
    fit = [name for name, info in QTYPES.items() if not weight or info.signed or info.kind == "int"]
    name = draw(st.sampled_from(sorted(fit)))
    info = QTYPES[name]
    symmetric = draw(st.booleans()) if info.kind == "int" else True
    if weight:
        symmetric = (symmetric and info.qmin < 0) or info.kind != "int"
    kwargs = {
        "symmetric": symmetric,
        "calibration": draw(calibrations),
        "static": not weight and draw(st.booleans()),
        "rounding": draw(st.sampled_from(["nearest", "stochastic"])),
    }
    if info.group_size is None:
        values = st.one_of(st.just(PerTensor()), st.just(PerChannel()), st.builds(PerGroup, st.integers(1, 4096)))
        kwargs["granularity"] = draw(values)
        kwargs["scale_dtype"] = draw(st.sampled_from([None, "float32", "bfloat16", jnp.float16]))
        if isinstance(kwargs["granularity"], PerGroup) and symmetric and info.kind == "int" and info.qmax <= 7:
            kwargs["two_level"] = draw(st.booleans())
            kwargs["scale_dtype"] = None if kwargs["two_level"] else kwargs["scale_dtype"]
    if symmetric and info.kind == "int" and info.qmin < 0:
        kwargs["narrow_range"] = draw(st.sampled_from([None, True, False]))
    return QuantSpec(name, **kwargs)


op_specs = st.one_of(
    st.builds(OpSpec, weight=st.none() | quant_specs(weight=True), act=st.none() | quant_specs()),
    st.builds(OpSpec, weight=quant_specs(weight=True), act=st.just(QuantSpec("int8")), outliers=st.floats(0.1, 9)),
)
rules = st.builds(
    Rule,
    st.sampled_from([".*", "head", r"layers/\d+/", "^params/(a|b)$"]),
    st.none() | op_specs,
    st.none() | st.sampled_from([(-2,), (-3, -2), (-1,)]),
)


@given(st.one_of(quant_specs(), op_specs, rules))
def test_json_round_trip(value):
    text = value.to_json()
    again = type(value).from_json(text)
    assert again == value
    assert hash(again) == hash(value)
    assert again.to_json() == text
    assert type(value).from_dict(value.to_dict()) == value
    assert "\n" not in text
    json.loads(text)


@given(quant_specs())
def test_repr_evaluates_and_pickles(spec):
    classes = (QuantSpec, AbsMax, MinMax, MSE, Entropy, Percentile, EMA, PerTensor, PerChannel, PerGroup)
    names = {c.__name__: c for c in classes}
    assert eval(repr(spec), names) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@given(quant_specs())
def test_the_type_in_force(spec):
    info = spec.type
    assert info.name == spec.qtype
    full = QTYPES[spec.qtype]
    narrow = info != full
    if narrow:
        assert info == dataclasses.replace(full, qmin=-full.qmax)
    may_be_narrow = spec.symmetric and full.kind == "int" and full.qmin < 0
    asked = spec.narrow_range
    unasked = full.bits > 6 and not isinstance(spec.calibration, MSE)
    assert narrow == (may_be_narrow and (asked if asked is not None else unasked))
    default = AbsMax() if spec.symmetric and full.qmin < 0 else MinMax()
    if may_be_narrow and not narrow:
        default = MinMax() if spec.rounding == "stochastic" else WholeRange(full.qmax)
    assert spec.observer == (default if spec.calibration is None else spec.calibration)


@needs_jit
def test_frozen_hashable_and_static():
    spec = QuantSpec("int4", granularity="per_group", group_size=np.int64(32), scale_dtype=jnp.bfloat16)
    assert spec == QuantSpec("int4", granularity="per_group", group_size=32, scale_dtype="bfloat16")
    assert type(spec.group_size) is int
    assert {spec: 1}[QuantSpec.from_json(spec.to_json())] == 1
    for value, name in ((spec, "qtype"), (OpSpec(spec), "weight"), (Rule("a", None), "pattern")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    traces = []

    def fn(x, spec):
        traces.append(1)
        return jq.fake_quant(x, spec, reduce_axes=(-1,))

    jitted = jax.jit(fn, static_argnames="spec")
    jitted(jnp.ones((2, 32)), spec=QuantSpec("int4"))
    jitted(jnp.ones((2, 32)), spec=QuantSpec(jnp.int4))
    assert len(traces) == 1


def test_reprs_are_brief():
    assert repr(QuantSpec("int8")) == "QuantSpec('int8')"
    assert repr(QuantSpec("mxfp4")) == "QuantSpec('mxfp4', granularity=PerGroup(32))"
    assert repr(OpSpec(QuantSpec("int4", calibration=MSE()))) == "OpSpec(weight=QuantSpec('int4', calibration=MSE()))"
    assert repr(Rule("head", None)) == "Rule('head', None)"
    assert repr(Rule("a", OpSpec(), (-2,))) == "Rule('a', OpSpec(), reduce_axes=(-2,))"


def test_granularity_is_a_value_that_equals_its_name():
    """A name, with the size of a group, and a value make equal specs; each value equals its own name alone."""
    names = ("per_tensor", "per_channel", "per_group")
    for value, name in zip((PerTensor(), PerChannel(), PerGroup(32)), names, strict=True):
        size: dict[str, Any] = {"group_size": 32} if name == "per_group" else {}
        spec = QuantSpec("int4", granularity=name, **size)
        assert spec == QuantSpec("int4", granularity=value)
        assert hash(spec) == hash(QuantSpec("int4", granularity=value))
        assert type(spec.granularity) is type(value)
        assert spec.group_size == size.get("group_size")
        assert [spec.granularity == other for other in names] == [name == other for other in names]
        assert [spec.granularity != other for other in names] == [name != other for other in names]
        found: dict[Any, int] = {name: 1}
        assert found[spec.granularity] == 1
        assert pickle.loads(pickle.dumps(value)) == value
        assert QuantSpec.from_json(spec.to_json()) == spec
        assert json.loads(spec.to_json()) == {
            "qtype": "int4",
            **({} if name == "per_channel" else {"granularity": name}),
            **size,
        }
    assert PerGroup(32) != PerGroup(64)
    assert PerTensor() != PerChannel()
    assert untyped.PerGroup(np.int32(64)) == PerGroup(64)
    assert [repr(v) for v in (PerTensor(), PerChannel(), PerGroup(64))] == [
        "PerTensor()",
        "PerChannel()",
        "PerGroup(64)",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PerGroup(64).size = 32  # type: ignore[misc]
    assert inspect.signature(QuantSpec).parameters["granularity"].default == "per_channel"


def test_granularity_is_replaced_as_one():
    spec = QuantSpec("int4", granularity=PerGroup(64), symmetric=False)
    assert dataclasses.replace(spec, granularity=PerGroup(32)).group_size == 32
    assert dataclasses.replace(spec, granularity=PerTensor()) == QuantSpec(
        "int4", granularity="per_tensor", symmetric=False
    )
    assert dataclasses.replace(spec, symmetric=True) == QuantSpec("int4", granularity=PerGroup(64))
    with pytest.raises(QuantError, match=r"both give the size of a group; .*granularity=PerGroup\(64\), group_size=32"):
        dataclasses.replace(spec, group_size=32)


# As jaxquant has written them since before granularity was a value.
FILES = {
    '{"qtype": "int4", "granularity": "per_group", "group_size": 64}': QuantSpec("int4", granularity=PerGroup(64)),
    '{"qtype": "int8", "granularity": "per_tensor", "static": true}': QuantSpec(
        "int8", granularity=PerTensor(), static=True
    ),
    '{"qtype": "int4", "granularity": "per_group", "group_size": 64, "scale_dtype": "uint4"}': QuantSpec(
        "int4", granularity=PerGroup(64), two_level=True
    ),
    '{"weight": {"qtype": "int8"}, "act": {"qtype": "int8", "outliers": 6.0}}': OpSpec(
        QuantSpec("int8"), QuantSpec("int8"), outliers=6.0
    ),
}


@pytest.mark.parametrize("text, value", FILES.items())
def test_files_are_as_before(text, value):
    assert type(value).from_json(text) == value
    assert value.to_json() == text


def test_block_formats_fix_their_groups():
    for name, size in (("mxfp8", 32), ("mxfp4", 32), ("nvfp4", 16)):
        spec = QuantSpec(name)
        assert (spec.granularity, spec.group_size) == ("per_group", size)
        assert QuantSpec(name, granularity="per_group", group_size=size) == spec
        assert json.loads(spec.to_json()) == {"qtype": name}


def test_rules_search_the_path():
    rule = Rule(r"layers/\d+/kernel", None)
    assert rule.matches("params/layers/12/kernel")
    assert not rule.matches("params/layers/a/kernel")
    assert Rule("^params", None).matches("params/x")
    assert not Rule("^x", None).matches("params/x")
    assert Rule("a", None, [-2, -1]).reduce_axes == (-2, -1)
    assert Rule("a", None, -2).reduce_axes == (-2,)


# (call, start of the message, value named, remedy)
BAD = [
    (lambda: QuantSpec("int9"), "QuantSpec: unknown number type", "qtype='int9'", "int"),
    (lambda: QuantSpec("fp8"), "QuantSpec: unknown number type", "'fp8'", "Nearest: float8_e4m3fn, float8_e5m2. All: "),
    (lambda: QuantSpec("E4M3"), "QuantSpec: unknown number type", "'E4M3'", "Nearest: float8_e4m3fn. All: "),
    (lambda: QuantSpec("int1"), "QuantSpec: unknown number type", "'int1'", "Nearest: int2, int3. All: "),
    (lambda: QuantSpec("uint16"), "QuantSpec: unknown number type", "'uint16'", "Nearest: uint8, uint7. All: "),
    (lambda: QuantSpec("float4"), "QuantSpec: unknown number type", "'float4'", "float4_e2m1fn, mxfp4, nvfp4."),
    (lambda: untyped.QuantSpec(4), "QuantSpec: unknown number type", "'4'", "Nearest: int4, int3. All: "),
    (lambda: QuantSpec("q4_0"), "QuantSpec: unknown number type", "'q4_0'", "Nearest: int4, int3. All: "),
    (lambda: QuantSpec("bf16"), "QuantSpec: unknown number type", "'bf16'", "float8_e4m3fn, float8_e5m2, int8."),
    (lambda: QuantSpec("iq4_xs"), "QuantSpec: unknown number type", "'iq4_xs'", "iq4_nl"),
    (lambda: QuantSpec("flaot8_e4m3fn"), "QuantSpec: unknown number type", "flaot8", "float8_e4m3fn"),
    (lambda: QuantSpec(jnp.float32), "QuantSpec: unknown number type", "float32", "Nearest: float8_e4m3fn"),
    (lambda: QuantSpec(object), "QuantSpec: unknown number type", "qtype=", "All: int2"),
    (lambda: untyped.QuantSpec({"a": 1}), "QuantSpec: unknown number type", "{'a': 1}", "All: int2"),
    (lambda: QuantSpec("int8", granularity="channel"), "QuantSpec: unknown granularity", "'channel'", "per_channel"),
    (lambda: QuantSpec("mxfp4", granularity="group"), "QuantSpec: unknown granularity", "'group'", "per_group"),
    (lambda: QuantSpec("int8", granularity="per_group"), "QuantSpec: group_size goes with", "group_size=None", "both"),
    (lambda: QuantSpec("int8", group_size=32), "QuantSpec: group_size goes with", "group_size=32", "neither"),
    (lambda: QuantSpec("int8", granularity="per_group", group_size=0), "QuantSpec: group_size must be", "=0", "64"),
    (lambda: QuantSpec("int8", granularity="per_group", group_size=-4), "QuantSpec: group_size must be", "=-4", "64"),
    (lambda: untyped.QuantSpec("int8", granularity="per_group", group_size=8.0), "QuantSpec: group_size must be",
     "8.0", "64"),
    (lambda: QuantSpec("int8", granularity="per_group", group_size=True), "QuantSpec: group_size must", "True", "64"),
    (lambda: untyped.QuantSpec("int8", granularity=PerGroup), "QuantSpec: unknown granularity", "PerGroup",
     "PerGroup(64)"),
    (lambda: untyped.QuantSpec("int8", granularity=64), "QuantSpec: unknown granularity", "=64", "PerGroup(64)"),
    (lambda: QuantSpec("int8", granularity=PerTensor(), group_size=8), "QuantSpec: group_size goes", "=8", "neither"),
    (lambda: QuantSpec("int8", granularity=PerGroup(8), group_size=8), "QuantSpec: granularity and group_size both",
     "group_size=8", "one of them"),
    (lambda: PerGroup(0), "PerGroup: size must be a positive integer", "size=0", "64"),
    (lambda: PerGroup(True), "PerGroup: size must be a positive integer", "size=True", "64"),
    (lambda: untyped.PerGroup("64"), "PerGroup: size must be a positive integer", "size='64'", "64"),
    (lambda: QuantSpec("mxfp4", granularity=PerGroup(64)), "QuantSpec: mxfp4 always has one", "(64)", "Leave"),
    (lambda: QuantSpec("nvfp4", granularity=PerTensor()), "QuantSpec: nvfp4 always has", "PerTensor()", "Leave"),
    (lambda: QuantSpec("int4", granularity=PerGroup(8), scale_dtype=jnp.uint4), "QuantSpec: scale_dtype must be",
     "uint4", "two_level=True"),
    (lambda: untyped.QuantSpec("int4", two_level=1), "QuantSpec: two_level must be True or False", "two_level=1",
     "bool"),
    (lambda: QuantSpec("int4", two_level=True), "QuantSpec: two-level scales are for symmetric integers",
     "PerChannel()", "PerGroup(64)"),
    (lambda: QuantSpec("mxfp4", two_level=True), "QuantSpec: two-level scales are for", "PerGroup(32)", "Leave"),
    (lambda: QuantSpec("mxfp4", group_size=64), "QuantSpec: mxfp4 always has one scale per 32", "=64", "Leave"),
    (lambda: QuantSpec("nvfp4", granularity="per_tensor"), "QuantSpec: nvfp4 always has", "per_tensor", "Leave"),
    (lambda: QuantSpec("mxfp8", scale_dtype="float32"), "QuantSpec: mxfp8 fixes the format", "float32", "Leave"),
    (lambda: QuantSpec("nf4", symmetric=False), "QuantSpec: nf4 has no zero point", "symmetric=False", "integer"),
    (lambda: QuantSpec("float8_e5m2", symmetric=False), "QuantSpec: float8_e5m2 has no", "symmetric=False", "integer"),
    (lambda: untyped.QuantSpec("int8", symmetric=1), "QuantSpec: symmetric must be True or False", "symmetric=1",
     "bool"),
    (lambda: untyped.QuantSpec("int8", static="yes"), "QuantSpec: static must be True or False", "'yes'", "bool"),
    (lambda: untyped.QuantSpec("int8", narrow_range=1), "QuantSpec: narrow_range must be", "narrow_range=1",
     "Leave it out"),
    (lambda: QuantSpec("uint8", narrow_range=True), "QuantSpec: narrow_range=True needs", "qtype='uint8'", "Leave"),
    (lambda: QuantSpec("int8", symmetric=False, narrow_range=True), "QuantSpec: narrow_range=True", "False", "Leave"),
    (lambda: QuantSpec("nf4", narrow_range=True), "QuantSpec: narrow_range=True needs", "qtype='nf4'", "Leave"),
    (lambda: untyped.QuantSpec("int8", calibration="mse"), "QuantSpec: calibration must be an observer", "'mse'",
     "MSE"),
    (lambda: untyped.QuantSpec("int8", calibration=MSE), "QuantSpec: calibration must be an observer", "MSE",
     "Percentile"),
    (lambda: QuantSpec("int8", scale_dtype="int8"), "QuantSpec: scale_dtype must be a float", "int8", "bfloat16"),
    (lambda: QuantSpec("int8", scale_dtype=jnp.float8_e4m3fn), "QuantSpec: scale_dtype must be", "float8", "bfloat16"),
    (lambda: QuantSpec("int8", scale_dtype="nope"), "QuantSpec: scale_dtype must be", "nope", "bfloat16"),
    (lambda: untyped.QuantSpec("int8", scale_dtype={"f": 1}), "QuantSpec: scale_dtype must be", "f", "bfloat16"),
    (lambda: untyped.QuantSpec("int8", rounding="up"), "QuantSpec: unknown rounding", "'up'", "stochastic"),
    (lambda: untyped.OpSpec("int8"), "OpSpec: weight must be a QuantSpec or None", "'int8'", "Wrap"),
    (lambda: OpSpec(act=jnp.int8), "OpSpec: act must be a QuantSpec or None", "int8", "Wrap"),
    (lambda: OpSpec(QuantSpec("int8", static=True)), "OpSpec: a weight's range is taken", "static=True", "act"),
    (lambda: OpSpec(QuantSpec("uint4")), "OpSpec: a symmetric unsigned type", "'uint4'", "symmetric=False"),
    (lambda: OpSpec(grad=QuantSpec("int8")), "OpSpec: quantized gradients need", "None", "Leave grad out"),
    (lambda: Rule("(", None), "Rule: bad regular expression", "pattern='('", "re.search"),
    (lambda: untyped.Rule(3, None), "Rule: bad regular expression", "pattern=3", "re.search"),
    (lambda: untyped.Rule("a", QuantSpec("int8")), "Rule: spec must be an OpSpec or None", "QuantSpec('int8')",
     "OpSpec"),
    (lambda: Rule("a", None, (0,)), "Rule: reduce_axes must be negative", "(0,)", "from the end"),
    (lambda: Rule("a", None, ()), "Rule: reduce_axes must be negative", "()", "from the end"),
    (lambda: untyped.Rule("a", None, 1.5), "Rule: reduce_axes must be negative", "1.5", "from the end"),
    (lambda: QuantSpec.from_json("{"), "QuantSpec: not JSON", "", "to_json"),
    (lambda: QuantSpec.from_json("3"), "QuantSpec: unknown fields", "data=3", "qtype"),
    (lambda: QuantSpec.from_json("null"), "QuantSpec: unknown fields", "data=None", "qtype"),
    (lambda: QuantSpec.from_json("[]"), "QuantSpec: unknown fields", "data=[]", "qtype"),
    (lambda: QuantSpec.from_json('{"qtype": "int8", "axis": 1}'), "QuantSpec: unknown fields", "axis", "group_size"),
    (lambda: QuantSpec.from_json("{}"), "QuantSpec: the field qtype is missing", "()", "Name"),
    (lambda: QuantSpec.from_json('{"qtype": "int9"}'), "QuantSpec: unknown number type", "'int9'", "int"),
    (lambda: QuantSpec.from_json('{"qtype": ["int8"]}'), "QuantSpec: unknown number type", "qtype=", "int"),
    (lambda: QuantSpec.from_json('{"qtype": "int8", "calibration": {"Best": {}}}'), "QuantSpec: unknown calibration",
     "Best", "MSE"),
    (lambda: QuantSpec.from_json('{"qtype": "int8", "calibration": {}}'), "QuantSpec: unknown calibration", "{}", "MS"),
    (lambda: QuantSpec.from_json('{"qtype": "int8", "calibration": {"MSE": {}, "EMA": {}}}'),
     "QuantSpec: unknown calibration", "EMA", "MSE"),
    (lambda: QuantSpec.from_json('{"qtype": "int8", "calibration": {"EMA": {"rate": 1}}}'),
     "QuantSpec: unknown calibration", "rate", "EMA"),
    (lambda: QuantSpec.from_json('{"qtype": "int8", "calibration": {"EMA": {"decay": 2}}}'), "EMA: decay must be in",
     "decay=2", "0.99"),
    (lambda: OpSpec.from_json('{"weight": 3}'), "QuantSpec: unknown fields", "data=3", "qtype"),
    (lambda: OpSpec.from_json('{"w": null}'), "OpSpec: unknown fields", "'w'", "weight"),
    (lambda: Rule.from_json("{}"), "Rule: the field pattern or spec is missing", "()", "both"),
    (lambda: Rule.from_json('{"pattern": "a"}'), "Rule: the field pattern or spec is missing", "pattern", "both"),
    (lambda: Rule.from_json('{"pattern": "a", "spec": null, "reduce_axes": "ab"}'), "Rule: reduce_axes must be", "'a'",
     "end"),
]  # fmt: skip


@pytest.mark.parametrize("call, start, value, remedy", BAD)
def test_bad_specs_say_what_and_what_to_do(call, start, value, remedy):
    with pytest.raises(QuantError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(start)
    assert value in message
    assert remedy in message
    assert message.endswith(".")
