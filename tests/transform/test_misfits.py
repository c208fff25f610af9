"""What does not fit is named at once, all of it; and rules that say what becomes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrowed import present, untyped
from transform_cases import check, unequal

import jaxquant as jq
from jaxquant import recipes
from jaxquant.core.blocks import group_error

SIZES = (288, 100, 64, 63, 97)
PARAMS = {f"l{i}": {"kernel": unequal((n, 4), i)} for i, n in enumerate(SIZES)}
XS = [unequal((2, n), 9) for n in SIZES]
NO_GROUPS = ("l0", "l1", "l3", "l4")


def fn(p, *xs):
    return sum(x @ p[f"l{i}"]["kernel"] for i, x in enumerate(xs))


def plan_of(*rules):
    return jq.make_plan(fn, PARAMS, *XS, rules=rules)


@pytest.mark.every
@pytest.mark.parametrize(
    "call",
    [
        lambda rule: plan_of(rule),
        lambda rule: jq.quantize_params(PARAMS, [rule]),
    ],
    ids=["plan", "params"],
)
@pytest.mark.parametrize("spec", [recipes.w4a16(64), recipes.mxfp4()], ids=["group", "format"])
def test_all_are_named(call, spec):
    rule = jq.Rule(".", spec)
    with pytest.raises(jq.QuantError) as caught:
        call(rule)
    first, *lines = str(caught.value).split("\n")
    group = spec.weight.group_size
    wrong = [f"l{i}" for i, n in enumerate(SIZES) if n % group]
    assert f"{len(wrong)} things are refused" in first
    assert [line.split(" at ")[1].split("/")[0] for line in lines] == wrong
    for line in lines:
        assert f"group_size={group}" in line
        assert ("a group size such as" in line) == (spec.weight.qtype == "int4" and "l4" not in line)
        assert "misfit='float'" in line if spec.weight.qtype == "mxfp4" else "misfit='per_channel'" in line


def test_other_kinds_of_errors_are_named_with_them():
    rules = [jq.Rule("nothing", None), jq.Rule("l1", recipes.w4a16(64)), jq.Rule("l0", recipes.w8a16(), (-1,))]
    with pytest.raises(jq.QuantError) as caught:
        plan_of(*rules)
    text = str(caught.value)
    assert "3 things" in text
    assert all(part in text for part in ("pattern='nothing'", "at l1/kernel: group_size", "at l0/kernel: the rule's"))
    broken = {**PARAMS, "a": {"kernel": np.full((2, 2), np.nan, np.float32)}, "b": {"kernel": jnp.zeros((0, 2))}}
    with pytest.raises(
        jq.QuantError, match=r"(?s)at a/kernel: a weight must be finite.*at b/kernel: the weight is empty"
    ):
        jq.quantize_params(broken, [jq.Rule("", recipes.w8a16())])


@pytest.mark.every
@pytest.mark.parametrize(
    ("length", "group", "sizes"),
    [
        (9, 8, ["3", "9"]),
        (16, 6, ["4", "8", "2"]), (36, 16, ["9", "12", "18"]), (25, 4, ["5", "25"]), (97, 64, []),
        (1, 4, []),
    ],
)  # fmt: skip
def test_suggested_sizes(length, group, sizes):
    """Each once, none of them 1, and none where only a whole channel is left."""
    text = str(group_error("f", (length, 2), (-2,), group, path=None))
    found = text.split("such as ")[1].split(", or")[0].split(", ") if "such as" in text else []
    assert sorted(found) == sorted(sizes)
    assert "granularity=PerChannel()" in text


@pytest.mark.every
@pytest.mark.parametrize("spec", [recipes.w4a16(64), recipes.w4a16(64, two_level=True), recipes.w4a4(64)], ids=str)
def test_per_channel_instead(spec):
    """Those that fit keep their groups; the plan says which do not, and those are as if asked for per channel."""
    plan = plan_of(jq.Rule(".", spec, misfit="per_channel"))
    assert {p.split("/")[0] for p in plan if present(plan[p].spec.weight).granularity == "per_channel"} == set(
        NO_GROUPS
    )
    assert plan["l2/kernel"].spec == spec
    assert "l1/kernel: weight" in " ".join(str(plan).split())
    assert "per channel: no group of 64 divides 100" in " ".join(str(plan).split())
    assert jq.Plan.from_json(plan.to_json()) == plan
    q = jq.quantize_params(PARAMS, plan)
    if spec.act is None:
        by_rule = jq.quantize_params(PARAMS, [jq.Rule(".", spec, misfit="per_channel")])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(q), jax.tree.leaves(by_rule))
    w = np.asarray(PARAMS["l3"]["kernel"])
    assert q["l3"]["kernel"].scale.shape == (1, 4)
    step = np.abs(w).max(0, keepdims=True) / 7
    assert np.all(np.abs(np.asarray(q["l3"]["kernel"].dequantize()) - w) <= 0.51 * step)


def test_float_instead():
    rule = jq.Rule(".", recipes.mxfp4(), misfit="float")
    plan = check(fn, PARAMS, *XS, rules=[rule], expect={"l0/kernel": (-2,), "l2/kernel": (-2,)}, grad=False)
    reasons = {left.path: left.reason for left in plan.floats}
    assert reasons["l1/kernel"] == "no group of 32 divides 100"
    assert not isinstance(jq.quantize_params(PARAMS, [rule])["l1"]["kernel"], jq.QTensor)
    assert jq.Rule.from_json(rule.to_json()) == rule
    with pytest.raises(jq.QuantError, match="3 things"):  # a format has no channels to fall back to
        plan_of(jq.Rule(".", recipes.mxfp4(), misfit="per_channel"))
    with pytest.raises(jq.QuantError, match="unknown misfit"):
        untyped.Rule(".", recipes.mxfp4(), misfit="channel")


# -- rules without a plan ----------------------------------------------------------------------------------------------


def attention(features, heads, *, bias, stack=()):
    """Shapes of Flax's `MultiHeadDotProductAttention` with 2 heads, by its documentation."""
    inner = {
        name: {"kernel": (*stack, features, heads, 4), "bias": (*stack, heads, 4)} for name in ("query", "key", "value")
    }
    shapes = {**inner, "out": {"kernel": (*stack, heads, 4, features), "bias": (*stack, features)}}
    made = jax.tree.map(lambda s: unequal(s, sum(s)), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return made if bias else {name: {"kernel": layer["kernel"]} for name, layer in made.items()}


@pytest.mark.every
@pytest.mark.parametrize("bias", [True, False])
def test_attention_by_rules(bias):
    """The scale of each output is that of its own column."""
    q = jq.quantize_params(attention(16, 2, bias=bias), [jq.Rule("kernel", recipes.w8a8())])
    shapes = {name: layer["kernel"].scale.shape for name, layer in q.items()}
    assert shapes == {**dict.fromkeys(("query", "key", "value"), (1, 2, 4)), "out": (1, 1, 16)}


@pytest.mark.every
def test_stacks_and_general_layers_by_their_bias():
    params = {
        "stack": {"kernel": unequal((3, 8, 4)), "bias": jnp.zeros((3, 4))},
        "in2": {"kernel": unequal((3, 8, 4)), "bias": jnp.zeros(4)},
        "out2": {"kernel": unequal((8, 3, 4)), "bias": jnp.zeros((3, 4))},
        "block": attention(16, 2, bias=True, stack=(3,)),
    }
    q = jq.quantize_params(params, [jq.Rule("kernel", recipes.w8a16())])
    assert q["stack"]["kernel"].scale.shape == (3, 1, 4)
    assert q["in2"]["kernel"].scale.shape == (1, 1, 4)
    assert q["out2"]["kernel"].scale.shape == (1, 3, 4)
    assert q["block"]["query"]["kernel"].scale.shape == (3, 1, 2, 4)
    assert q["block"]["out"]["kernel"].scale.shape == (3, 1, 1, 16)
    # One layer of a stack is a QTensor like any other.
    one = jax.tree.map(lambda leaf: leaf[1], q["stack"]["kernel"])
    alone = jq.quantize(params["stack"]["kernel"][1], jq.QuantSpec("int8"), reduce_axes=(-2,))
    np.testing.assert_array_equal(one.dequantize(), alone.dequantize())


@pytest.mark.every
def test_what_shapes_leave_open_is_refused():
    """As many layers as inputs, as many heads as features: either reading is possible."""
    both = {"kernel": jnp.ones((8, 8, 4)), "bias": jnp.zeros((8, 4))}
    params = {"a": both, "b": attention(4, 4, bias=False), "c": {"kernel": jnp.ones((2, 3, 4))}}
    with pytest.raises(jq.QuantError) as caught:
        jq.quantize_params(params, [jq.Rule("kernel", recipes.w8a16())])
    text = str(caught.value)
    assert "6 things" in text
    assert "make_plan(fn, params, *args, rules=rules) finds them" in text
