"""Plans: what they say, what they refuse, and that an empty one changes nothing."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_settings import needs_jit
from narrowed import present, untyped
from transform_cases import EVERYTHING, SPECS, unequal

import jaxquant as jq
from jaxquant import recipes
from jaxquant.ops.kernels.cpu.machine import int8_dots

pytestmark = pytest.mark.every

X = unequal((4, 32), 7, 0.3)
PARAMS = {
    "dense": {"kernel": unequal((32, 48), 1, 0.3), "bias": jnp.zeros(48, jnp.float32)},
    "out": {"kernel": unequal((48, 8), 2, 0.3)},
}
RULES = [jq.Rule("dense", recipes.w4a16(8)), jq.Rule("out", recipes.w8a8())]


def mlp(p, x):
    return jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"][None]) @ p["out"]["kernel"]


def test_table():
    plan = jq.make_plan(mlp, PARAMS, X, rules=RULES)
    # 32*48 int4 in 768 bytes and 4*48 scales; 48*8 int8 and 8 scales; 48 biases
    kernels = [item.kernel for item in plan.items]
    assert kernels[0] == "float32 blocks"
    assert kernels[1] in ("int8", "float32 blocks")  # as the machine has it
    rule = "-" * 80
    assert max(map(len, str(plan).splitlines())) == 80
    assert [" ".join(line.split()) for line in str(plan).splitlines()] == [
        "path bytes before after",
        rule,
        "dense/kernel 6,144 1,536",
        f"dot_general [32, 48] over -2: w int4 g8; {kernels[0]}",
        "out/kernel 1,536 416",
        f"dot_general [48, 8] over -2: w int8, a int8; {kernels[1]}",
        "dense/bias 192 192",
        "[48] float32: added, not contracted",
        rule,
        "total: 2 quantized (3.67x smaller) 7,872 2,144",
    ]


def test_the_table_fits_80_columns():
    """Whatever the reasons are; only a name that is longer itself takes more."""
    deep = "/".join(["a_long_name_of_a_module"] * 3)
    params = {
        deep: jnp.ones((64, 48), jnp.float32),
        "w": jnp.ones((64, 48), jnp.float32),
        "v": jnp.ones((64, 48), jnp.float32),
    }

    def fn(p, x):
        return x @ p[deep], x @ p["w"] + jnp.sum(p["w"] ** 2), jnp.sort(p["v"])

    rules = [jq.Rule("a_long", "w4a8:g16"), jq.Rule("w", jq.recipes.w8a8(), dequantize=True)]
    plan = jq.make_plan(fn, params, jnp.ones((2, 64), jnp.float32), rules=rules)
    lines = str(plan).splitlines()
    assert max(map(len, lines)) == 80
    assert lines[lines.index(deep) + 1].split() == ["12,288", "2,304"]


def test_kernels_of_convolutions_and_experts():
    """What `ops.conv` and `ops.ragged` choose, by what both know: float dots where the machine has none of int8."""
    params = {
        "conv": jnp.ones((3, 3, 8, 16), jnp.float32),
        "depthwise": jnp.ones((3, 3, 1, 16), jnp.float32),
        "experts": jnp.ones((2, 16, 8), jnp.float32),
    }

    def fn(p, x):
        window: Any = dict(window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = lax.conv_general_dilated(x, p["conv"], **window)
        x = lax.conv_general_dilated(x, p["depthwise"], feature_group_count=16, **window)
        return lax.ragged_dot(x.reshape(-1, 16), p["experts"], jnp.array([3, 13]))

    def kernels(spec):
        plan = jq.make_plan(fn, params, jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.float32), rules=[jq.Rule("", spec)])
        assert jq.Plan.from_json(plan.to_json()) == plan
        assert plan["depthwise"].window == (16, 1, 9)
        return [item.kernel for item in plan.items]

    if int8_dots() == "none":
        integer = digits = ["float32", "float32", "float32 blocks"]
    else:
        integer, digits = ["int8"] * 3, ["int8 residual split", "float32", "int8 residual split"]
    assert kernels(recipes.w8a8()) == integer
    assert kernels(recipes.w8a16()) == digits
    assert kernels(recipes.fp8()) == ["float32", "float32", "float32 blocks"]


def test_json_and_lookup():
    plan = jq.make_plan(mlp, PARAMS, X, rules=RULES)
    assert jq.Plan.from_json(plan.to_json()) == plan
    assert list(plan) == ["dense/kernel", "out/kernel"]
    assert len(plan) == 2
    assert "out/kernel" in plan
    assert "dense/bias" not in plan
    assert plan["out/kernel"].spec == recipes.w8a8()
    with pytest.raises(KeyError, match="nowhere"):
        plan["nowhere"]


def test_shapes_will_do():
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    assert jq.make_plan(mlp, *shapes, rules=RULES) == jq.make_plan(mlp, PARAMS, X, rules=RULES)


def test_bytes_are_those_of_the_arrays():
    """Stacked, packed with a remainder, a convolution that is stored in its own order."""
    params = {"w": unequal((3, 9, 5)), "k": unequal((2, 2, 3, 5)), "n": unequal((32, 7))}

    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
        z = lax.scan(lambda c, w: (c, jnp.ones((1, 9), jnp.float32) @ w), 0, p["w"])[1]
        return y, z, jnp.ones((1, 32), jnp.float32) @ p["n"]

    rules = [jq.Rule("n", recipes.nvfp4()), EVERYTHING(recipes.w4a16(None))]
    plan = jq.make_plan(fn, params, jnp.ones((1, 4, 4, 3), jnp.float32), rules=rules)
    assert {item.path: (item.stacked, item.contraction_minor) for item in plan.items} == {
        "w": (1, True), "k": (0, False), "n": (0, True),
    }  # fmt: skip
    for path, leaf in jq.quantize_params(params, plan).items():
        assert plan[path].nbytes == (params[path].nbytes, leaf.nbytes)


def test_rules_alone_know_flax_layers():
    shapes = {
        "Conv_0/kernel": (3, 3, 8, 4),
        "Embed_0/embedding": (16, 8),
        "Dense_0/kernel": (32, 4),
        "Dense_0/bias": (4,),
    }
    qparams = jq.quantize_params({name: unequal(shape) for name, shape in shapes.items()}, [EVERYTHING(INT8)])
    assert {name: leaf.scale.shape for name, leaf in qparams.items() if isinstance(leaf, jq.QTensor)} == {
        "Conv_0/kernel": (1, 1, 1, 4), "Embed_0/embedding": (16, 1), "Dense_0/kernel": (1, 4),
    }  # fmt: skip


def test_activations_of_a_lookup_are_not_quantized():
    table = {"table": unequal((16, 32))}
    plan = jq.make_plan(lambda p, i: p["table"][i], table, jnp.arange(3), rules=[EVERYTHING(SPECS["static"])])
    assert plan["table"].spec == jq.OpSpec(SPECS["static"].weight)
    assert jq.act_state(plan, jq.calibrate(lambda p, i: p["table"][i], plan, table, [jnp.arange(3)])) == {}


def test_other_axes_run_in_float_and_the_plan_says_so():
    fn = lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x)  # noqa: E731
    plan = jq.make_plan(fn, {"w": PARAMS["dense"]["kernel"]}, X, rules=[EVERYTHING(SPECS["int8"])])
    assert plan["w"].note == "dot_general over axes (-1,) runs on float values: scales are shared over (-2,)"
    assert (plan["w"].in_float, plan["w"].notes) == ((plan["w"].note,), ())
    assert jq.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(jq.QuantError, match="precondition at w: the weight is used in another way too"):
        jq.invariances.precondition(
            fn, plan, {"w": jq.ptq.bases.Rotation.random(jax.random.key(0), plan["w"].channels)}
        )
    assert f"w: {plan['w'].note}" in " ".join(str(plan).split())


def test_own_derivatives_are_noted():
    @jax.custom_vjp
    def scaled(w, x):
        return x @ w

    scaled.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (2 * r[1].T @ g, g @ r[0].T))
    plan = jq.make_plan(lambda p, x: scaled(p["w"], x), {"w": unequal((32, 4))}, X, rules=[EVERYTHING(SPECS["int8"])])
    assert plan["w"].note.startswith("enters a function with a derivative rule of its own")


@pytest.mark.parametrize("size", [1, 32, 48])
def test_axes_do_not_depend_on_the_batch(size):
    plan = jq.make_plan(mlp, PARAMS, jnp.ones((size, 32), jnp.float32), rules=RULES)
    assert [item.reduce_axes for item in plan.items] == [(-2,), (-2,)]


def program(fn, *args):
    """The compiled program without names and places."""
    text = present(jax.jit(fn).lower(*args).compile().as_text())
    text = re.sub(r",? ?metadata=\{[^}]*\}", "", text)
    text = re.sub(r"HloModule \S+", "HloModule", text)
    return re.sub(r"(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "", text)


@needs_jit
def test_an_empty_plan_adds_nothing():
    fn = jax.checkpoint(
        lambda p, x: lax.scan(lambda x, _: (jax.nn.gelu(mlp(p, x)) @ jnp.ones((8, 32), jnp.float32), None), x, None, 3)[
            0
        ]
    )
    assert program(jq.quantized(fn, jq.Plan(())), PARAMS, X) == program(fn, PARAMS, X)
    grad = lambda fn: jax.grad(lambda p, x: jnp.sum(fn(p, x)))  # noqa: E731
    assert program(grad(jq.quantized(fn, jq.Plan(()))), PARAMS, X) == program(grad(fn), PARAMS, X)


def test_transformations_outside():
    plan = jq.make_plan(mlp, PARAMS, X, rules=RULES)
    qparams, run = jq.quantize_params(PARAMS, plan), jq.quantized(mlp, plan)
    y = run(qparams, X)
    mapped = jax.jit(jax.vmap(run, (None, 0)))(qparams, X[:, None])
    np.testing.assert_allclose(mapped[:, 0], y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.checkpoint(run))(qparams, X), y, rtol=1e-5, atol=1e-5)
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), qparams)
    np.testing.assert_allclose(jax.jit(jax.vmap(run, (0, None)))(twice, X)[1], y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lax.map(lambda x: run(qparams, x[None])[0], X), y, rtol=1e-5, atol=1e-5)
    assert jax.eval_shape(run, qparams, X).shape == y.shape
    slope = jax.jit(jax.grad(lambda p, x: jnp.sum(jax.checkpoint(run)(p, x) ** 2)))(PARAMS, X)
    np.testing.assert_allclose(
        slope["out"]["kernel"],
        jax.jit(jax.grad(lambda p, x: jnp.sum(run(p, x) ** 2)))(PARAMS, X)["out"]["kernel"],
        rtol=1e-4,
        atol=1e-4,
    )


def straight(x, spec, axes):
    return jq.fake_quant(x, spec, reduce_axes=axes)


@pytest.mark.parametrize("way", ["w8a8", "static", "int4"])
def test_gradients_are_straight_through(way):
    """Against the same function with the fakes written out by hand."""
    plan = jq.make_plan(mlp, PARAMS, X, rules=[EVERYTHING(SPECS[way])])
    state = jq.act_state(plan, jq.calibrate(mlp, plan, PARAMS, [X])) if way == "static" else None
    spec = SPECS[way]

    def act(path, x):
        if spec.act is None:
            return x
        given = {} if state is None else {"scale": jnp.reshape(state[path]["scale"], (1, 1))}
        return jq.fake_quant(x, spec.act, reduce_axes=(-1,), **given)

    def by_hand(p, x):
        w = {k: straight(p[k]["kernel"], spec.weight, (-2,)) for k in ("dense", "out")}
        h = jnp.tanh(act("dense/kernel", x) @ w["dense"] + p["dense"]["bias"][None])
        return act("out/kernel", h) @ w["out"]

    def slope(fn):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(fn(p, x))), argnums=(0, 1)))(PARAMS, X)

    got, want = slope(jq.quantized(mlp, plan, state, precision="highest")), slope(by_hand)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.max(np.abs(b))))


def plan_of(rules, params=PARAMS, fn=mlp, x=X):
    return jq.make_plan(fn, params, x, rules=rules)


def a_plan():
    return plan_of(RULES)


def other_params():
    return {"dense": {"kernel": jnp.ones((32, 4), jnp.float32), "bias": 3}}


def test_rules_may_come_from_a_generator():
    assert str(plan_of(rule for rule in RULES)) == str(a_plan())


INT8 = recipes.w8a16()
STATIC_TOKENS = jq.OpSpec(jq.QuantSpec("int8"), jq.QuantSpec("int8", static=True))


def with_range(entry):
    return jq.quantized(mlp, plan_of([jq.Rule("out", SPECS["static"])]), {"out/kernel": entry})(PARAMS, X)


BAD = {
    "a rule that matches nothing": (
        lambda: plan_of([jq.Rule("dens/kernel", INT8)]),
        r"^make_plan: a rule matches no weight; got pattern='dens/kernel'\. Nearest .*: 'dense/kernel', 'out/kern",
    ),
    "a rule that matches a bias": (
        lambda: plan_of([jq.Rule("bias", INT8)]),
        r"^make_plan: a rule matches no weight; .* It matches only .*: dense/bias \(added, not contracted\)\.$",
    ),
    "rules that are no list": (
        lambda: plan_of(jq.Rule(".", INT8)),
        r"^make_plan: rules must be a sequence of Rule; got rules=",
    ),
    "a spec": (lambda: plan_of(INT8), r"^make_plan: rules must be a sequence of Rule; got rules=.*Pass a list"),
    "rules of strings": (lambda: plan_of(["dense"]), r"^make_plan: rules must be a sequence of Rule; .*Pass a list"),
    "a group that does not divide": (
        lambda: plan_of([jq.Rule("dense", recipes.w4a16(24))]),
        r"^make_plan at dense/kernel: group_size must divide the length 32 .*group_size=24.* such as 8, 16, 32,",
    ),
    "a group of activations that does not divide": (
        lambda: plan_of(
            [jq.Rule("dense", jq.OpSpec(act=jq.QuantSpec("int8", granularity="per_group", group_size=24)))]
        ),
        r"^make_plan \(activation\) at dense/kernel: group_size must divide the length 32",
    ),
    "other axes than the function's": (
        lambda: plan_of([jq.Rule("dense", INT8, reduce_axes=(-1,))]),
        r"^make_plan at dense/kernel: the rule's .* are not .*reduce_axes=\(-1,\)\. Leave .* or give \(-2,\)\.$",
    ),
    "a static range per token": (
        lambda: plan_of([jq.Rule("dense", STATIC_TOKENS)]),
        r"^make_plan at dense/kernel: a static activation has one range .*PerChannel\(\)\. Use granularity=PerTensor",
    ),
    "params without arrays": (
        lambda: jq.make_plan(lambda p: p, {"n": 3}, rules=[]),
        r"^make_plan: params hold no arrays; got params='dict'\. Params are argument 0",
    ),
    "two parameters of one path": (
        lambda: plan_of([], {"a/b": X, "a": {"b": X}}, lambda p, x: x),
        r"^params at a/b: two parameters have one path\. Rename one",
    ),
    "params of another shape": (
        lambda: jq.quantized(mlp, a_plan())({**PARAMS, "out": {"kernel": jnp.ones((48, 9), jnp.float32)}}, X),
        r"^quantized: params and plan do not agree: out/kernel has shape \(48, 9\), planned \(48, 8\)\. Make the plan",
    ),
    "params of another model": (
        lambda: jq.calibrate(mlp, a_plan(), {"Dense": PARAMS["dense"]}, [X]),
        r"^calibrate: params and plan do not agree: dense/kernel is missing \(nearest: 'Dense/kernel'.*; out/k",
    ),
    "a weight of another type": (
        lambda: jq.quantized(mlp, a_plan())(jq.quantize_params(PARAMS, [EVERYTHING(INT8)]), X),
        r"^quantized: params and plan do not agree: dense/kernel is QTensor\(int8.*, planned QuantSpec\('int4'",
    ),
    "a number for a weight": (
        lambda: jq.quantize_params({"dense": {"kernel": 3, "b": X}, "out": PARAMS["out"]}, a_plan()),
        r"^quantize_params: params and plan do not agree: dense/kernel is 3, planned \(32, 48\)",
    ),
    "no state": (
        lambda: jq.quantized(mlp, plan_of([jq.Rule("out", SPECS["static"])]))(PARAMS, X),
        r"^quantized: static activation ranges are missing; got paths=\('out/kernel',\)\. Calibrate: pass state=",
    ),
    "state of another plan": (
        lambda: jq.quantized(mlp, a_plan(), {"elsewhere": {"scale": 1.0}})(PARAMS, X),
        r"^quantized at elsewhere: state does not fit the plan; got entry='dict'\. Use what act_state",
    ),
    "state that is no dict": (
        lambda: untyped.quantized(mlp, a_plan(), [0.1])(PARAMS, X),
        r"^quantized: state must be a dict by path; got state=\[0\.1\]\. Pass what act_state",
    ),
    "a range for an activation that has its own": (
        lambda: jq.quantized(mlp, a_plan(), {"out/kernel": {"scale": 1.0}})(PARAMS, X),
        r"^quantized at out/kernel: the plan takes no static range here; got act=QuantSpec.*Leave it out",
    ),
    "a range with a zero point that its spec has not": (
        lambda: with_range({"scale": np.float32(1), "zero_point": np.int8(0)}),
        r"^quantized at out/kernel: a static range here has scale; got entry=\('scale', 'zero_point'\)",
    ),
    "a step that is an integer": (
        lambda: with_range({"scale": np.int32(1)}),
        r"^quantized at out/kernel: scale must be a float; got scale=int32\[\]\. Cast it",
    ),
    "a step of 0": (
        lambda: with_range({"scale": np.float32(0)}),
        r"^quantized at out/kernel: scale must be finite and above 0; got least=0\.0\. Calibrate again",
    ),
    "a step that is not finite": (
        lambda: with_range({"scale": jnp.float32(jnp.inf)}),
        r"^quantized at out/kernel: scale must be finite and above 0; got least=inf\. Calibrate again",
    ),
    "state without a plan": (
        lambda: untyped.quantized(mlp, state={"w": 1}),
        r"^quantized: state needs a plan; got paths=\('w',\)",
    ),
    "rules for a plan": (
        lambda: untyped.quantized(mlp, RULES),
        r"^quantized: plan must be a Plan or None; got plan=.*Make one from rules",
    ),
    "rules and a weight of no known kind": (
        lambda: jq.quantize_params({"attention": {"kernel": jnp.ones((4, 2, 3), jnp.float32)}}, [EVERYTHING(INT8)]),
        r"^quantize_params at attention/kernel: neither name nor shape .*Pass a plan: .*Or write Rule\('\.\*', spec",
    ),
    "rules that match no weight": (
        lambda: jq.quantize_params(PARAMS, [jq.Rule("bias", INT8)]),
        r"^quantize_params: a rule matches no weight; got pattern='bias'\. Nearest weights: ",
    ),
    "a weight that is quantized already": (
        lambda: jq.quantize_params(jq.quantize_params(PARAMS, [EVERYTHING(INT8)]), [EVERYTHING(INT8)]),
        r"quantize_params at dense/kernel: the weight is quantized already; got weight=.*QTensor\(int8",
    ),
    "an empty weight": (
        lambda: jq.quantize_params({"kernel": jnp.ones((0, 4), jnp.float32)}, [EVERYTHING(INT8)]),
        r"^quantize_params at kernel: the weight is empty; got shape=\(0, 4\)\. Leave it",
    ),
    "a weight that is not finite": (
        lambda: jq.quantize_params(
            {"kernel": np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, np.nan, 1.0]], np.float32)}, [EVERYTHING(INT8)]
        ),
        r"^quantize_params at kernel: a weight must be finite; got nan_or_inf=1, shape=\(2, 4\)",
    ),
    "axes that the weight does not have": (
        lambda: jq.quantize_params({"kernel": X}, [jq.Rule("kernel", INT8, reduce_axes=(-3,))]),
        r"^quantize_params at kernel: quantize_params: reduce_axes must be axes of a 2-dimensional array",
    ),
    "no batches": (
        lambda: jq.calibrate(mlp, a_plan(), PARAMS, []),
        r"^calibrate: there are no batches\. Pass at least one",
    ),
    "no statistics": (
        lambda: jq.act_state(plan_of([EVERYTHING(SPECS["static"])]), {}),
        r"^act_state: there are no ranges for some static activations; got paths=\('dense/kernel', 'out/kernel'\)",
    ),
    "not a plan": (lambda: jq.Plan.from_json("{}"), r"^Plan: not a plan \(KeyError"),
    "not JSON": (lambda: jq.Plan.from_json("x"), r"^Plan: not a plan \(JSONDecodeError"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    call, message = BAD[name]
    with pytest.raises(jq.QuantError) as caught:
        call()
    text = str(caught.value)
    assert re.search(message, text), text
    assert text.endswith(".")
