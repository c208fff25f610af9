"""The kernel that computes an activation and quantizes it, in Pallas' interpreter."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives as p
from jax_settings import makes_nan, needs_jit, promotes
from narrowed import present

import jaxquant as jq
from jaxquant.core.affine import as_codes
from jaxquant.core.qtensor import flat
from jaxquant.core.qtypes import QTYPES
from jaxquant.ops.kernels.tpu import produced
from jaxquant.ops.kernels.tpu.produced import produced_rows
from jaxquant.ops.kernels.tpu.quantize import rows_of_blocks
from jaxquant.ops.rowwise import Form, Produced, RowFunction, Step, produced_codes

K = 256


def norm(x: jax.Array, w: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / K + 1e-5) * w


def shifted(x: jax.Array, row: jax.Array, one: jax.Array) -> jax.Array:
    return x * row - jnp.max(x, axis=1, keepdims=True) + one


def gated(x: jax.Array, gate: jax.Array) -> jax.Array:
    return gate * jax.nn.sigmoid(gate) * x


FUNCTIONS = {
    "norm": (
        norm,
        RowFunction(
            ("rows", "column"),
            (
                Step(p.mul_p, (0, 0)),
                Step(p.reduce_sum_p, (2,)),
                Step(p.div_p, (3, float(K).hex())),
                Step(p.add_p, (4, (1e-5).hex())),
                Step(p.rsqrt_p, (5,)),
                Step(p.mul_p, (0, 6)),
                Step(p.mul_p, (7, 1)),
            ),
        ),
    ),
    "gated": (
        gated,
        RowFunction(("rows", "rows"), (Step(p.logistic_p, (1,)), Step(p.mul_p, (1, 2)), Step(p.mul_p, (3, 0)))),
    ),
    "shifted": (
        shifted,
        RowFunction(
            ("rows", "row", "scalar"),
            (Step(p.mul_p, (0, 1)), Step(p.reduce_max_p, (0,)), Step(p.sub_p, (3, 4)), Step(p.add_p, (5, 2))),
        ),
    ),
}
SIZES = {"rows": lambda m: (m, K), "row": lambda m: (m, 1), "column": lambda m: (1, K), "scalar": lambda m: (1, 1)}
SPEC = jq.QuantSpec("int8")


def inputs(function: RowFunction, m: int, dtype: Any) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=SIZES[form](m)) * 3, dtype) for form in function.inputs)


def run(function: RowFunction, args: tuple[jax.Array, ...], qtype: str = "int8") -> tuple[jax.Array, jax.Array]:
    like = jax.ShapeDtypeStruct((args[0].shape[0], K), args[0].dtype)
    return produced_rows(args, like, function=function, qtype=QTYPES[qtype], interpret=True)


@promotes
@pytest.mark.parametrize("m", [64, 300, 7])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_codes_of_what_a_function_makes(name: str, dtype: Any, m: int):
    fn, function = FUNCTIONS[name]
    args = inputs(function, m, dtype)
    codes, scale = run(function, args)
    made = fn(*(x.astype(jnp.float32) for x in args)).astype(dtype)
    want = as_codes(made, SPEC, (-1,))
    real, whole = codes * scale, flat(want.scale)
    np.testing.assert_allclose(scale, whole, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6)
    # Another order of a sum may move a value over the middle between two codes.
    near = 0.51 if dtype == jnp.float32 else 1.01
    assert float(jnp.max(jnp.abs(real - made.astype(jnp.float32)) / whole)) <= near
    assert float(jnp.mean(codes != want.kept)) < (1e-3 if dtype == jnp.float32 else 2e-2)


@makes_nan
@pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn"])
def test_a_row_with_nan_has_no_scale_and_infinities_saturate(qtype: str):
    _, function = FUNCTIONS["gated"]
    x, gate = inputs(function, 64, jnp.float32)
    x = x.at[3, 5].set(jnp.nan).at[40, 7].set(jnp.inf)
    gate = gate.at[40, 7].set(2.0)
    codes, scale = run(function, (x, gate), qtype)
    want = as_codes(gated(x, gate), jq.QuantSpec(qtype), (-1,))
    np.testing.assert_allclose(scale, flat(want.scale), rtol=1e-6)
    assert np.isnan(scale[3, 0])
    assert np.isfinite(np.delete(np.asarray(scale), 3)).all()
    pattern = lax.bitcast_convert_type(codes, jnp.uint8)[40, 7]
    assert int(pattern) == (127 if qtype == "int8" else 0x7E)


def test_under_vmap():
    _, function = FUNCTIONS["norm"]
    x, w = inputs(function, 96, jnp.float32)
    codes, scale = jax.vmap(lambda x: run(function, (x, w)), 0)(x.reshape(2, 48, K))
    whole, scales = run(function, (x, w))
    np.testing.assert_array_equal(codes.reshape(96, K), whole)
    np.testing.assert_array_equal(scale.reshape(96, 1), scales)


@pytest.mark.every
@pytest.mark.parametrize("axes", [(-1,), (-2,)])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_other_platforms_and_other_ranges_quantize_the_activation_itself(granularity: Any, axes: tuple[int, ...]):
    """On a TPU the kernel reads the inputs, one scale for each row alone; elsewhere nothing does."""
    fn, function = FUNCTIONS["norm"]
    args = inputs(function, 64, jnp.float32)
    spec = jq.QuantSpec("int8", granularity=granularity)
    how: dict[str, Any] = {"function": function, "spec": spec, "axes": axes}

    def kernels(platform: Any) -> str:
        on = functools.partial(produced_codes.on_platform, platform, **how)
        return str(jax.make_jaxpr(on)(fn(*args), args))

    assert ("if_undivided" in kernels("tpu")) == (granularity == "per_channel" and axes == (-1,))
    assert "if_undivided" not in kernels("cpu")
    got = produced_codes(fn(*args), args, **how)
    want = as_codes(fn(*args), spec, axes)
    np.testing.assert_array_equal(got.kept, want.kept)
    np.testing.assert_array_equal(flat(got.scale), flat(want.scale))


@pytest.mark.every
@pytest.mark.parametrize("many", ["row", "column"])
def test_more_inputs_than_memory_holds(many: Form):
    """A number of each row takes the 128 lanes of a TPU: fewer rows are computed at a time, or none."""
    m, k = (65536, 128) if many == "row" else (64, 32768)
    sizes = {"rows": (m, k), "row": (m, 1), "column": (1, k)}
    how: dict[str, Any] = {"spec": SPEC, "axes": (-1,)}

    def rows(count: int) -> int:
        forms: list[Form] = [many] * count
        function = RowFunction(("rows", *forms), (Step(p.tanh_p, (0,)),))
        args = tuple(jax.ShapeDtypeStruct(sizes[form], jnp.float32) for form in function.inputs)
        on_tpu = functools.partial(produced_codes.on_platform, "tpu", function=function, **how)
        found = produced._rows(args[0], cast(Any, args), function)
        assert ("if_undivided" in str(jax.make_jaxpr(on_tpu)(args[0], args))) == (found > 0)
        return found

    assert rows(0) == rows_of_blocks(m, k)
    if many == "row":
        assert 32 <= rows(40) < rows(10) < rows(0)
    else:
        assert rows(40) == 0


@needs_jit  # a choice by devices is made where a program is lowered
def test_arrays_of_a_program_are_given_as_matrices(monkeypatch: pytest.MonkeyPatch):
    """A batch of sequences, a vector for all columns, and a scalar."""
    monkeypatch.setattr(
        produced, "produced_rows", lambda *args, **how: produced_rows(*args, **{**how, "interpret": True})
    )
    _, function = FUNCTIONS["norm"]
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 40, K), (K,)))
    made = norm(x.reshape(-1, K), w[None]).reshape(x.shape)
    on = functools.partial(produced_codes.on_platform, "tpu", function=function, spec=SPEC, axes=(-1,))
    got, want = jax.jit(on)(jnp.zeros_like(x), (x, w)), as_codes(made, SPEC, (-1,))
    assert got.shape == want.shape
    assert float(jnp.mean(got.kept != want.kept)) < 1e-3
    np.testing.assert_allclose(present(flat(got.scale)), present(flat(want.scale)), rtol=1e-6)


def test_equal_functions_are_one_key():
    _, function = FUNCTIONS["norm"]
    twin = RowFunction(function.inputs, tuple(function.steps))
    assert hash(twin) == hash(function)
    assert twin == function
    produced = Produced(inputs(function, 64, jnp.float32), function)
    assert jax.tree.structure(produced) == jax.tree.structure(Produced(produced.inputs, twin))
