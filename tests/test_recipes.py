"""bitsandbytes' recipes through a plan: its codes, its results."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from narrowed import present
from ptq_cases import golden

import jaxquant as jq
from jaxquant import ops, ptq, recipes


def test_llm_int8_through_a_plan_is_that_of_bitsandbytes():
    ref = golden("llm_int8_matmul_thr6.0")
    x, params = jnp.asarray(ref["x"]), {"w": jnp.asarray(ref["w"].T), "b": jnp.asarray(ref["bias"])[None]}
    fn = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", recipes.llm_int8())])
    assert "a int8 below 6" in " ".join(str(plan).split())
    assert jq.Plan.from_json(plan.to_json()) == plan
    y = jax.jit(jq.quantized(fn, plan))(jq.quantize_params(params, plan), x)
    assert y.dtype == jnp.float16
    out = ref["out"].astype(np.float32)  # some of its weights' codes are one off: ties
    np.testing.assert_allclose(y.astype(jnp.float32), out, atol=3 * np.abs(out).max() * 2.0**-11)
    plain = jq.make_plan(fn, params, x, rules=[jq.Rule("w", recipes.w8a8())])
    far = jax.jit(jq.quantized(fn, plain))(jq.quantize_params(params, plain), x)
    exact = fn(jax.tree.map(lambda a: a.astype(jnp.float32), params), x.astype(jnp.float32))
    lost = lambda y: float(jnp.linalg.norm(y.astype(jnp.float32) - exact))  # noqa: E731
    assert lost(y) < lost(far)


def test_features_with_outliers_train_and_contract_as_einsums_do():
    x = jnp.linspace(-1.0, 1.0, 24).reshape(4, 6).at[1, 2].set(40.0)
    w = jnp.linspace(-1.0, 1.0, 18).reshape(6, 3)
    q = jq.quantize(w, jq.QuantSpec("int8"), reduce_axes=(-2,))
    product = lambda x, w: ops.einsum("bi,io->bo", x, w, spec=recipes.llm_int8())  # noqa: E731

    @jax.jit
    def run(x, w, q):
        gradient = jax.grad(lambda x, w: jnp.sum(product(x, w)), (0, 1))
        return product(x, q), ops.llm_int8(x, q), gradient(x, w)

    got, expected, (dx, dw) = run(x, w, q)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dx, jnp.broadcast_to(w.sum(1), (4, 6)), atol=0.02)
    np.testing.assert_allclose(dw[2], jnp.full(3, x[:, 2].sum()), rtol=1e-5)


@pytest.mark.parametrize(
    "qtype, recipe", [("nf4", recipes.nf4), pytest.param("fp4", recipes.fp4, marks=pytest.mark.slow)]
)
def test_four_bits_with_double_quantization_and_a_compute_dtype(qtype, recipe):
    ref = golden(f"bnb_{qtype}_48x128_b64_dq_bfloat16")
    params = {"w": jnp.asarray(ref["orig"]).astype(jnp.bfloat16).T}
    fn, x = lambda p, x: x @ p["w"], jnp.eye(128, dtype=jnp.bfloat16)
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", recipe())])
    qparams = jq.quantize_params(params, plan, method=ptq.double_quantized)
    assert qparams["w"].scale.qtype == "dynamic8"
    y = jax.jit(jq.quantized(fn, plan))(qparams, x)
    assert y.dtype == jnp.bfloat16
    near = np.asarray(y.astype(jnp.float32)).T, ref["ref_dequant"].astype(np.float32)
    np.testing.assert_allclose(*near, rtol=0.02, atol=1e-6)


def test_refusals():
    int8 = jq.QuantSpec("int8")
    wrong: list[Any] = [-1, 0, True, "6", float("nan")]
    for bad in wrong:
        with pytest.raises(jq.QuantError, match=r"outliers must be a positive threshold; got outliers="):
            jq.OpSpec(int8, int8, outliers=bad)
    changes: list[Any] = [
        {"granularity": jq.PerTensor()}, {"static": True}, {"symmetric": False}, {"rounding": "stochastic"},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(jq.QuantError, match=r"dynamic, symmetric range per token.*use act=QuantSpec\('int8'\)"):
            jq.OpSpec(int8, jq.QuantSpec("int8", **change), outliers=6.0)
    with pytest.raises(jq.QuantError, match="OpSpec: outliers are for activations"):
        jq.OpSpec(int8, outliers=6.0)
    with pytest.raises(jq.QuantError, match="quantized gradients need"):
        jq.OpSpec(int8, int8, int8, outliers=6.0)
    with pytest.raises(jq.QuantError, match="outliers are for products of matrices"):
        ops.ragged_dot(jnp.ones((2, 4)), jnp.ones((1, 4, 3)), jnp.array([2]), spec=recipes.llm_int8())


def test_outliers_of_other_operations_are_refused_while_planning():
    """All of them at once, and by name; a lookup has no activation."""

    def fn(p, x):
        image = lax.conv_general_dilated(
            p["table"][x][None], p["image"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return lax.ragged_dot(image[0] @ p["dense"], p["experts"], jnp.array([3]))

    params = {
        "table": jnp.ones((9, 4)),
        "image": jnp.ones((2, 4, 6)),
        "dense": jnp.ones((6, 8)),
        "experts": jnp.ones((1, 8, 5)),
    }
    with pytest.raises(jq.QuantError, match="2 things are refused") as caught:
        jq.make_plan(fn, params, jnp.array([1, 0, 7]), rules=[jq.Rule(".", "llm_int8")])
    rule = "outliers are for products of matrices, not"
    assert f"make_plan at experts: {rule} ragged_dot; got outliers=6.0. Give it a rule of its own" in str(caught.value)
    assert f"make_plan at image: {rule} conv_general_dilated" in str(caught.value)


def test_recipes_by_name():
    for name in set(recipes.__all__) - {"recipe"}:
        assert recipes.recipe(name) == getattr(recipes, name)()
    assert recipes.recipe("w4a16:g32:asym").weight == jq.QuantSpec(
        "int4", granularity="per_group", group_size=32, symmetric=False
    )
    assert recipes.recipe("w4a16:channel") == jq.OpSpec(jq.QuantSpec("int4"))
    assert present(recipes.recipe("w4a8:g128:two_level").weight).two_level
    assert recipes.recipe("nvfp4:act") == jq.OpSpec(jq.QuantSpec("nvfp4"), jq.QuantSpec("nvfp4"))
    spec = recipes.w8a8()
    assert recipes.recipe(spec) is spec


@pytest.mark.parametrize("text", ["w4a16:g0", "w4a16:g32:g64", "w4a16:", "fp8:static", "w4a16:G64", "recipe", ""])
def test_no_recipe_of_this_name(text):
    with pytest.raises(jq.QuantError, match=r"^recipe: "):
        recipes.recipe(text)
