"""What a weight is multiplied with, if not by floats of the usual dtypes: complex numbers, integers, fp8, NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_settings import makes_nan, promotes
from transform_cases import EVERYTHING, SPECS, close, planned, unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, ops

W = {"w": unequal((8, 6), 1, 0.3)}
X = unequal((4, 8), 7, 0.3)
TO_FLOAT32 = {"preferred_element_type": jnp.float32}


def dot(p, x):
    return lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), **TO_FLOAT32)


OTHER_PRODUCTS = {
    "complex64": lambda p, x: (x + 1j) @ p["w"],
    "int32": lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32),
}


@pytest.mark.parametrize("dtype", OTHER_PRODUCTS)
def test_products_that_are_no_floats_stay_in_float(dtype):
    fn, both = OTHER_PRODUCTS[dtype], {**W, "v": unequal((8, 6), 2, 0.3)}
    with pytest.raises(jq.QuantError, match=rf"w \(in a product of dtype {dtype}\)"):
        jq.make_plan(fn, W, X, rules=[EVERYTHING(SPECS["w8a8"])])
    rules = [EVERYTHING(SPECS["w8a8"], dequantize=True)]
    plan = jq.make_plan(lambda p, x: (fn(p, x), fn({"w": p["v"]}, x), x @ p["w"]), both, X, rules=rules)
    assert [item.path for item in plan.items] == ["w"]
    assert {left.path: left.reason for left in plan.floats} == {"v": f"in a product of dtype {dtype}"}
    qparams = jq.quantize_params(both, plan)
    values = jq.dequantize_params(qparams)
    frozen = jax.jit(jq.quantized(fn, plan))(qparams, X)
    np.testing.assert_allclose(frozen, jax.jit(fn)(values, X), rtol=1e-5)


@promotes
def test_products_of_two_activations_that_are_no_floats_have_no_name():
    fn = lambda p, x: jax.named_call(lambda x: x @ x.T, name="real")(x) + ((x + 1j) @ x.T).real  # noqa: E731
    plan = jq.make_plan(fn, W, X, rules=[jq.OpRule(".", SPECS["w8a8"])])
    assert [product.name for product in plan.products] == ["real/dot_general"]


@pytest.mark.parametrize("dtype", ["int8", "bool", "float8_e4m3fn"])
@pytest.mark.parametrize("spec", ["int8", "w8a8", "static"])
def test_activations_of_other_dtypes_are_their_values(dtype, spec):
    """`lax` promotes them; so an activation is quantized from what it is promoted to."""
    x = jnp.asarray(np.arange(-16, 16).reshape(4, 8) % 7, dtype)
    plan, qparams, state = planned(dot, W, x, spec=spec)
    wide = jnp.asarray(np.asarray(x, np.float32))
    for params in (qparams, W):
        run = jax.jit(jq.quantized(dot, plan, state))
        np.testing.assert_array_equal(run(params, x), run(params, wide))
    close(run(qparams, x), np.asarray(wide, np.float64) @ np.asarray(jq.dequantize_params(qparams)["w"]), 2e-2)


def test_ops_name_the_dtypes_that_do_not_promote():
    q, x = jq.quantize(W["w"], QuantSpec("int8"), reduce_axes=(-2,)), X.astype(jnp.float8_e4m3fn)
    with pytest.raises(jq.QuantError, match="einsum: the dtypes of the operands promote to no common one"):
        ops.einsum("bi,io->bo", x, q, **TO_FLOAT32)
    with pytest.raises(jq.QuantError, match=r"dot_general: .*got lhs=float8_e4m3fn\[4, 8\].* Cast one"):
        ops.dot_general(x, W["w"], (((1,), (0,)), ((), ())), spec=OpSpec(weight=QuantSpec("int8")))


@makes_nan
@pytest.mark.parametrize("spec", ["static", "w8a8", "outliers"])
def test_nan_in_an_activation_is_seen_in_the_result(spec):
    """int8 has no code for it. A range per row keeps the other rows, one of the whole tensor does not."""
    rules = [EVERYTHING(jq.recipes.llm_int8())] if spec == "outliers" else [EVERYTHING(SPECS[spec])]
    plan, qparams, state = planned(dot, W, X, rules=rules)
    run = jax.jit(jq.quantized(dot, plan, state))
    for params in (qparams, W):
        found = np.isnan(run(params, X.at[1, 3].set(jnp.nan)))
        np.testing.assert_array_equal(found, np.full(found.shape, spec == "static") | (np.arange(4) == 1)[:, None])
