"""Bad calls: each raises `QuantError` and says where, which rule, what was given and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import makes_nan

import jaxquant as jq
from jaxquant import PerGroup, QuantError, QuantSpec
from jaxquant.core.blocks import block_shape
from jaxquant.core.errors import quant_error

pytestmark = pytest.mark.every

X = jnp.ones((6, 8), jnp.float32)
INT8 = QuantSpec("int8")
ASYM = QuantSpec("uint8", symmetric=False)
STOCHASTIC = QuantSpec("int8", rounding="stochastic")


def group(size, qtype="int8"):
    return QuantSpec(qtype, granularity="per_group", group_size=size)


# (call, rule, what the message must name)
BAD = {
    "integers": (lambda f: f(jnp.ones((2, 2), jnp.int32), INT8, 0), "only float arrays", ["int32", "(2, 2)", "Cast"]),
    "bool input": (lambda f: f(jnp.ones(2, bool), INT8, 0), "only float arrays", ["bool"]),
    "complex input": (lambda f: f(jnp.ones(2, jnp.complex64), INT8, 0), "only float arrays", ["complex64"]),
    "random keys": (lambda f: f(jax.random.key(0), INT8, ()), "only float arrays", ["key"]),
    "None": (lambda f: f(None, INT8, 0), "only arrays can be quantized", ["None", "float array"]),
    "a string": (lambda f: f("weights", INT8, 0), "only arrays can be quantized", ["'weights'"]),
    "ragged lists": (lambda f: f([[1.0], [1.0, 2.0]], INT8, 0), "only arrays can be quantized", ["[[1.0]"]),
    "a dict": (lambda f: f({"kernel": 1.0}, INT8, 0), "only arrays can be quantized", ["kernel"]),
    "a QTensor": (lambda f: f(jq.quantize(X, INT8, reduce_axes=0), INT8, 0), "quantized already", ["dequantize()"]),
    "an empty array": (lambda f: f(X[:3, :0], INT8, -1), "the array is empty", ["float32[3, 0]"]),
    "a spec's name": (lambda f: f(X, "int8", 0), "spec must be a QuantSpec", ["'int8'", "QuantSpec('int8')"]),
    "an OpSpec": (lambda f: f(X, jq.OpSpec(INT8), 0), "spec must be a QuantSpec", ["OpSpec"]),
    "no spec": (lambda f: f(X, None, 0), "spec must be a QuantSpec", ["spec=None"]),
    "axis too large": (lambda f: f(X, INT8, 2), "reduce_axes must be axes of a 2-dim", ["(2,)", "(6, 8)", "-2 to -1"]),
    "axis too small": (lambda f: f(X, INT8, (-3,)), "reduce_axes must be axes of a 2-dim", ["(-3,)"]),
    "axis of a scalar": (lambda f: f(jnp.float32(1), INT8, 0), "reduce_axes must be axes of a 0-dim", ["Use ()"]),
    "float axis": (lambda f: f(X, INT8, 1.0), "reduce_axes must be axes", ["1.0"]),
    "axis by name": (lambda f: f(X, INT8, "in"), "reduce_axes must be axes", ["'i'"]),
    "axis None": (lambda f: f(X, INT8, None), "reduce_axes must be axes", ["None"]),
    "axis True": (lambda f: f(X, INT8, True), "reduce_axes must be axes", ["True"]),
    "axis twice": (lambda f: f(X, INT8, (1, -1)), "reduce_axes repeats an axis", ["(1, -1)", "once"]),
    "group does not divide": (lambda f: f(X, group(3), -1), "must divide the length 8", ["=3", "2, 4", "(6, 8)"]),
    "group larger than the axis": (lambda f: f(X, group(16), -1), "group_size must divide the length 8", ["2, 4, 8"]),
    "group across an axis boundary": (lambda f: f(jnp.ones((4, 6)), group(4), (0, 1)), "end on an axis", ["3, 6"]),
    "block format does not divide": (lambda f: f(X, QuantSpec("mxfp4"), -1), "group_size must divide", ["=32", "8"]),
    "group without axes": (lambda f: f(X, group(4), ()), "groups need at least one reduced", ["reduce_axes=()"]),
    "stochastic without key": (lambda f: f(X, STOCHASTIC, 0), "stochastic rounding needs a key", ["key=None"]),
    "key without stochastic": (lambda f: f(X, INT8, 0, key=jax.random.key(0)), "rounding to nearest uses no key",
                               ["'nearest'", "'stochastic'"]),
    "zero point without scale": (lambda f: f(X, ASYM, 0, zero_point=3), "zero_point without scale", ["=3", "both"]),
    "scale without zero point": (lambda f: f(X, ASYM, 0, scale=1.0), "zero_point does not fit", ["symmetric=False"]),
    "zero point and symmetric": (lambda f: f(X, INT8, 0, scale=1.0, zero_point=3), "zero_point does not fit",
                                 ["symmetric=True"]),
    "scale of a wrong shape": (lambda f: f(X, INT8, -1, scale=jnp.ones(6, jnp.float32)),
                               "scale must have one entry per block",
                               ["float32[6]", "(6, 1)"]),
    "scale of the other axis": (lambda f: f(X, INT8, -1, scale=jnp.ones((1, 8), jnp.float32)),
                                "scale must have one entry per block",
                                ["float32[1, 8]"]),
    "scale per channel for groups": (lambda f: f(X, group(4), -1, scale=jnp.ones((6, 1))), "scale must have one entry",
                                     ["(6, 2)"]),
    "zero point of a wrong shape": (lambda f: f(X, ASYM, -1, scale=jnp.ones((6, 1)), zero_point=jnp.ones(6, jnp.int8)),
                                    "zero_point must have one entry per block", ["int8[6]", "(6, 1)"]),
    "scale quantized in another shape": (
        lambda f: f(X, INT8, -1, scale=jq.quantize(jnp.ones((6, 2)), INT8, reduce_axes=-1)),
        "scale must have one entry", ["(6, 1)"]),
}  # fmt: skip

# Only quantize looks at values, and packs.
BAD_QUANTIZE = {
    "NaN": (lambda f: f(X.at[0, 0].set(jnp.nan), INT8, 0), "NaN cannot be quantized", ["float32[6, 8]"]),
    "NaN, scale given": (lambda f: f(X.at[0, 0].set(jnp.nan), INT8, 0, scale=1.0), "NaN cannot be quantized", []),
    "scale 0": (lambda f: f(X, INT8, 0, scale=0.0), "the given scale must be finite and not 0", ["scale="]),
    "scale NaN": (lambda f: f(X, INT8, 0, scale=np.nan), "the given scale must be finite", []),
    "scale infinite": (lambda f: f(X, INT8, 0, scale=jnp.full((1, 8), jnp.inf)), "the given scale must be finite", []),
    "a scalar to be packed": (lambda f: f(1.0, QuantSpec("int4"), ()), "packed codes need an axis", ["int4", "(1,)"]),
}

FORM = re.compile(r"^(\w+)( at [\w/.]+)?: [^;]+(; got \w+=.+)?\. [A-Z].*\.$", re.DOTALL)


def call(name):
    function = getattr(jq, name)
    return lambda x, spec, axes, **given: function(x, spec, reduce_axes=axes, **given)


@makes_nan
@pytest.mark.parametrize("function", ["quantize", "fake_quant"])
@pytest.mark.parametrize("what", [*BAD, *BAD_QUANTIZE])
def test_bad_calls(function, what):
    bad, rule, named = {**BAD, **BAD_QUANTIZE}[what]
    if function == "fake_quant" and what in BAD_QUANTIZE:
        bad(call(function))  # NaN passes through it
        return
    with pytest.raises(QuantError) as raised:
        bad(call(function))
    check(str(raised.value), function, rule, named)


def check(message, function, rule, named):
    assert FORM.match(message), message
    assert message.startswith(f"{function}: ")
    assert rule in message
    for text in named:
        assert text in message


@pytest.mark.parametrize("what", [w for w in BAD if w not in ("random keys",)])
def test_bad_calls_raise_under_jit_too(what):
    """Shapes and specs are known while tracing."""
    bad, rule, _ = BAD[what]
    with pytest.raises(QuantError, match=re.escape(rule)):
        jax.jit(lambda: bad(call("quantize")))()


@pytest.mark.parametrize(
    "lo, hi, spec, rule, named",
    [
        (1.0, -1.0, INT8, "lo must not exceed hi", ["lo=", "hi=", "Swap"]),
        ([0.0, 2.0], [1.0, 1.0], INT8, "lo must not exceed hi", []),
        (np.nan, 1.0, INT8, "the range must be finite", ["NaN"]),
        (-1.0, np.inf, ASYM, "the range must be finite", ["inf"]),
        (np.zeros(2), np.ones(3), INT8, "lo and hi must have one shape", ["lo=(2,)", "hi=(3,)"]),
        (-1.0, 1.0, "int8", "spec must be a QuantSpec", ["'int8'"]),
    ],
)
def test_bad_ranges(lo, hi, spec, rule, named):
    with pytest.raises(QuantError) as raised:
        jq.scale_zero_point(jnp.asarray(lo), jnp.asarray(hi), spec)
    check(str(raised.value), "scale_zero_point", rule, named)


def test_the_nearest_group_sizes_are_named():
    for n, size, near in (
        (4096, 100, "64, 128"),
        (96, 64, "32, 48, 96"),
        (7, 2, r"\. Use granularity"),
        (9, 8, "as 3, 9, or"),
    ):
        with pytest.raises(QuantError, match=near):
            jq.quantize(jnp.ones((n, 2)), group(size), reduce_axes=(-2,))


def test_the_path_is_named():
    with pytest.raises(QuantError, match=r"^quantize_params at params/Dense_0/kernel: group_size must divide"):
        block_shape((6, 8), PerGroup(5), (-2,), function="quantize_params", path="params/Dense_0/kernel")
    error = quant_error("load", "shapes differ", path="a/b", todo="Check the file", saved=(2, 3), shape=(3, 2))
    assert str(error) == "load at a/b: shapes differ; got saved=(2, 3), shape=(3, 2). Check the file."


def test_values_are_shown_briefly():
    error = quant_error(
        "f", "r", todo="T", array=jnp.ones((1000, 1000), jnp.float32), text="x" * 1000, dtype=np.dtype("int8")
    )
    message = str(error)
    assert "array=float32[1000, 1000]" in message
    assert "dtype=int8" in message
    assert len(message) < 300
    assert isinstance(error, ValueError)
    assert str(quant_error("f", "rule", todo="Do it")) == "f: rule. Do it."
