"""The NNX layers against Flax's, and float weights with a spec against quantized ones."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax_settings import makes_nan, needs_jit
from narrowed import present
from nnx_cases import LAYERS, SPECS, assign, calibrated, close, dequantize_params, inits, pure, value, wavy

import jaxquant as jq
from jaxquant import recipes

NAMES = list(LAYERS)
W8 = recipes.w8a16()
SLOW = pytest.mark.slow


def rarely(*values):
    """These, as slow cases of a parametrized test."""
    return [pytest.param(v, marks=SLOW) for v in values]


def frozen(layer, **kwargs):
    return jq.nnx.quantize(layer, **kwargs)


def call(name, layer, x):
    """The layer's product: for a table, that is attend."""
    return layer.attend(x) if name == "embed" else layer(x)


# -- as Flax's --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"param_dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_same_state_and_values_as_flax(name, kwargs):
    case = LAYERS[name]
    ours = case.quant_class(*case.args, **case.kwargs, **kwargs, spec=recipes.w8a8(), rngs=nnx.Rngs(0))
    theirs = case.float_class(*case.args, **case.kwargs, **kwargs, rngs=nnx.Rngs(0))
    a, b = nnx.state(ours), nnx.state(theirs)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_without_spec_a_float_layer_is_flax_s(name):
    case = LAYERS[name]
    ours, theirs = case.ours(), case.flax()
    np.testing.assert_array_equal(call(name, ours, case.x()), call(name, theirs, case.x()))
    if name == "embed":
        index = jnp.array([[1, 0], [6, 3]])
        np.testing.assert_array_equal(ours(index), theirs(index))


@pytest.mark.parametrize("name", ["linear", *rarely("conv", "einsum")])
def test_no_bias(name):
    case = LAYERS[name]
    if name == "einsum":
        layer = jq.nnx.QuantEinsum(*case.args[:2], spec=W8, rngs=nnx.Rngs(0))
    else:
        layer = case.ours(use_bias=False, spec=W8)
    assert list(pure(layer)) == ["kernel"]
    close(layer(case.x()), frozen(layer)(case.x()), 1e-6)


@pytest.mark.parametrize("x_dtype", ["bfloat16", *rarely("float32")])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("name", ["linear", *rarely("embed")])
def test_result_dtype_is_flax_s(name, dtype, param_dtype, x_dtype):
    dtype, param_dtype, x_dtype = (None if d is None else jnp.dtype(d) for d in (dtype, param_dtype, x_dtype))
    case = LAYERS[name]
    layer = case.ours(dtype=dtype, param_dtype=param_dtype, spec=W8)
    want = call(name, case.dequantized(frozen(layer), dtype=dtype, param_dtype=param_dtype), case.x(x_dtype))
    for each in (layer, frozen(layer)):
        y = call(name, each, case.x(x_dtype))
        assert y.dtype == want.dtype
        close(y.astype(np.float32), want.astype(np.float32), 0.02)


@pytest.mark.parametrize("name", ["linear", "embed", *rarely("general", "conv", "einsum")])
def test_bfloat16_compute(name):
    case = LAYERS[name]
    layer = case.ours(dtype=jnp.bfloat16, spec=recipes.w8a8())
    q = frozen(layer)
    y = call(name, layer, case.x())
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, call(name, q, case.x()))  # the codes are those of the float32 weight in both
    want = call(name, case.dequantized(q), case.x())
    close(y.astype(np.float32), want, 0.03)


@pytest.mark.skipif(
    "preferred_element_type" not in inspect.signature(nnx.Linear.__init__).parameters,
    reason="Flax 0.11 has no such argument",
)
@pytest.mark.parametrize("name", ["linear", "conv", *rarely("general", "einsum")])
def test_preferred_element_type(name):
    case = LAYERS[name]
    kwargs = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32, "use_bias": False}
    if name == "einsum":
        kwargs.pop("use_bias")
    layer = case.ours(spec=W8, **kwargs)
    want = case.flax(**kwargs)(case.x()).dtype
    assert layer(case.x()).dtype == frozen(layer)(case.x()).dtype == want


def test_precision_reaches_the_operation():
    layer = LAYERS["linear"].ours(precision=lax.Precision.HIGHEST, spec=W8, use_bias=False)
    q, x = frozen(layer), LAYERS["linear"].x()
    want = np.asarray(x, np.float64) @ np.asarray(value(q.kernel).dequantize(), np.float64)
    close(q(x), want, 1e-6)


def test_promote_dtype_of_the_user():
    def to_half(args, /, **kwargs):
        return tuple(None if x is None else jnp.asarray(x, jnp.float16) for x in args)

    layer = LAYERS["linear"].ours(promote_dtype=to_half, spec=W8)
    x = LAYERS["linear"].x()
    assert layer(x).dtype == frozen(layer)(x).dtype == jnp.float16


# -- trained and frozen agree -----------------------------------------------------------------------------------------


FAST = ["w8a8", "w8a8 static"]


@pytest.mark.parametrize(
    "name, spec",
    [pytest.param(n, s, marks=[] if n == "linear" or s in FAST else SLOW, id=f"{n}-{s}") for n in NAMES for s in SPECS],
)
def test_float_weight_with_spec_computes_what_the_quantized_one_does(name, spec):
    case = LAYERS[name]
    layer = calibrated(case.ours(spec=SPECS[spec]), case.x(), call=lambda m, x: call(name, m, x))
    q = frozen(layer)
    assert isinstance(value(getattr(q, case.weight)), jq.QTensor)
    assert isinstance(value(getattr(layer, case.weight)), jax.Array)  # the model it came from is as it was
    y = call(name, layer, case.x())
    close(y, call(name, q, case.x()), 1e-6)
    # And both compute the product of the dequantized operands.
    x, act = case.x(), SPECS[spec].act
    if act is not None:
        axes = {"linear": (-1,), "general": (-2, -1), "conv": (-3, -2, -1), "einsum": (-1,), "embed": (-1,)}[name]
        given = {}
        if act.static:
            scale, zero_point = jq.scale_zero_point(value(layer.act_range.lo), value(layer.act_range.hi), act)
            given = {"scale": scale, "zero_point": zero_point}
        x = jq.fake_quant(x, act, reduce_axes=axes, **given)
    close(y, call(name, case.dequantized(q), x), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_weight_without_spec_is_weight_only(name):
    case = LAYERS[name]
    layer = case.ours()
    q = jq.quantize(value(getattr(layer, case.weight)), present(W8.weight), reduce_axes=case.reduce_axes)
    assign(getattr(layer, case.weight), q)
    want = call(name, case.dequantized(layer), case.x())
    close(call(name, layer, case.x()), want, 1e-4)


def test_activation_only():
    case = LAYERS["linear"]
    layer = case.ours(spec=jq.OpSpec(act=recipes.w8a8().act))
    x = jq.fake_quant(case.x(), present(recipes.w8a8().act), reduce_axes=(-1,))
    close(layer(case.x()), x @ value(layer.kernel) + value(layer.bias)[None], 1e-4)


# -- gradients --------------------------------------------------------------------------------------------------------


def reference(layer, x, spec, scale=None):
    """Straight through, in float: fake-quantized operands and nothing else."""
    w = value(layer.kernel)
    if spec.weight is not None:
        w = jq.fake_quant(w, spec.weight, reduce_axes=(-2,))
    if spec.act is not None:
        x = jq.fake_quant(x, spec.act, reduce_axes=(-1,), scale=scale)
    return x @ w + value(layer.bias)[None]


@pytest.mark.parametrize("spec", ["w8a8", "w8a8 static", *rarely("w8a16", "w4a8", "nvfp4")])
def test_gradients_are_straight_through(spec):
    case, spec = LAYERS["linear"], SPECS[spec]
    layer = calibrated(case.ours(spec=spec), case.x() * 0.8)  # so that a static range clips
    scale = None
    if spec.act is not None and spec.act.static:
        scale, _ = jq.scale_zero_point(value(layer.act_range.lo), value(layer.act_range.hi), spec.act)
    g = wavy((3, 6))
    grads, dx = nnx.grad(lambda m, x: jnp.sum(m(x) * g), argnums=(0, 1))(layer, case.x())
    want, want_dx = nnx.grad(lambda m, x: jnp.sum(reference(m, x, spec, scale) * g), argnums=(0, 1))(layer, case.x())
    for a, b in zip(jax.tree.leaves((grads, dx)), jax.tree.leaves((want, want_dx)), strict=True):
        close(a, b, 1e-5)
    assert float(np.abs(dx).max()) > 0


@pytest.mark.parametrize("name", ["conv", *rarely("general", "einsum")])
def test_gradients_of_the_other_layers(name):
    """The gradient at the fake-quantized weight, by Flax's layer."""
    case = LAYERS[name]
    layer = case.ours(spec=W8)
    float_layer = case.dequantized(frozen(layer))
    loss = lambda m: jnp.sum(jnp.sin(m(case.x())))  # noqa: E731
    a, b = nnx.grad(loss)(layer), nnx.grad(loss)(float_layer)
    close(a["kernel"][...], b["kernel"][...], 1e-3)
    close(a["bias"][...], b["bias"][...], 1e-3)


def test_gradients_of_a_table():
    case = LAYERS["embed"]
    layer, index = case.ours(spec=W8), jnp.array([1, 1, 4])
    grad = nnx.grad(lambda m: jnp.sum(m(index) * wavy((3, 32))))(layer)["embedding"][...]
    want = jnp.zeros((7, 32)).at[index].add(wavy((3, 32)))
    np.testing.assert_allclose(grad, want, rtol=1e-6)


# -- linear, general, einsum ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 3, 32), (0, 32)], ids=str)
def test_any_number_of_batch_axes(shape):
    case = LAYERS["linear"]
    q = frozen(case.ours(spec=recipes.w8a16()))
    close(q(wavy(shape)), case.dequantized(q)(wavy(shape)), 1e-4)


@pytest.mark.parametrize(
    "args, kwargs, shape, axes",
    [
        pytest.param((16, 4), {}, (3, 16), (-2,), marks=SLOW),
        pytest.param((16, (2, 3)), {"axis": 1}, (2, 16, 3), (-3,), marks=SLOW),
        (((2, 8), 4), {"axis": (1, -1)}, (3, 2, 5, 8), (-3, -2)),
        ((16, 4), {"batch_axis": {0: 3}}, (3, 5, 16), (-2,)),
    ],
    ids=str,
)
def test_general_variants(args, kwargs, shape, axes):
    kwargs |= {**inits(nnx.LinearGeneral)}
    layer = jq.nnx.QuantLinearGeneral(*args, **kwargs, spec=recipes.w4a16(group_size=8), rngs=nnx.Rngs(0))
    theirs = nnx.LinearGeneral(*args, **kwargs, rngs=nnx.Rngs(0))
    assert layer._reduce_axes == axes
    q, x = frozen(layer), wavy(shape)
    nnx.update(theirs, dequantize_params(pure(q)))
    close(q(x), theirs(x), 1e-4)
    close(q(x), layer(x), 1e-6)


@pytest.mark.parametrize(
    "subscripts, kernel, x, axes",
    [
        pytest.param("bd,df->bf", (16, 4), (3, 16), (-2,), marks=SLOW),
        ("...d,df->...f", (16, 4), (2, 3, 16), (-2,)),
        pytest.param("bhd,hdf->bf", (2, 8, 4), (3, 2, 8), (-3, -2), marks=SLOW),
        ("ebd,edf->ebf", (2, 16, 4), (2, 3, 16), (-2,)),  # one kernel per expert
        ("bd, fd -> bf", (4, 16), (3, 16), (-1,)),
    ],
)
def test_einsum_variants(subscripts, kernel, x, axes):
    layer = jq.nnx.QuantEinsum(subscripts, kernel, **inits(nnx.Einsum), spec=W8, rngs=nnx.Rngs(0))
    assert layer._reduce_axes == axes
    q, x = frozen(layer), wavy(x)
    want = jnp.einsum(subscripts, x, value(q.kernel).dequantize())
    close(q(x), want, 1e-4)
    close(q(x), layer(x), 1e-6)


def test_einsum_string_in_the_call():
    layer = jq.nnx.QuantEinsum("bd,df->bf", (16, 4), **inits(nnx.Einsum), spec=W8, rngs=nnx.Rngs(0))
    nnx_layer: Any = layer
    nnx_layer.einsum_str = None  # as Flax has it for subscripts that a call gives
    with pytest.raises(jq.QuantError, match="quantize at kernel: only a call says which axes"):
        frozen(layer)
    q = frozen(layer, rules=[jq.Rule("kernel", W8, reduce_axes=(-2,))])
    x = wavy((3, 16))
    close(q(x, "bd,df->bf"), layer(x, "bd,df->bf"), 1e-6)


# -- conv -------------------------------------------------------------------------------------------------------------


CONVS = {
    "strides": ((8, 4, (3, 3)), {"strides": 2}, (2, 6, 7, 8)),
    "valid": ((8, 4, (3, 3)), {"padding": "VALID"}, (2, 6, 7, 8)),
    "circular": ((8, 4, (3, 2)), {"padding": "CIRCULAR"}, (2, 6, 7, 8)),
    "reflect": ((8, 4, (3, 3)), {"padding": "REFLECT"}, (2, 6, 7, 8)),
    "pairs": ((8, 4, (3, 3)), {"padding": [(1, 2), 0]}, (2, 6, 7, 8)),
    "integer": ((8, 4, (3, 3)), {"padding": 2}, (2, 6, 7, 8)),
    "causal": ((8, 4, 3), {"padding": "CAUSAL", "kernel_dilation": 2}, (2, 9, 8)),
    "one dimension": ((8, 4, 3), {}, (2, 9, 8)),
    "three dimensions": ((4, 4, (2, 2, 2)), {}, (1, 3, 4, 5, 4)),
    "kernel dilation": ((8, 4, (3, 3)), {"kernel_dilation": 2}, (2, 7, 7, 8)),
    "input dilation": ((8, 4, (3, 3)), {"input_dilation": (2, 1), "padding": [(1, 1), (2, 0)]}, (2, 5, 5, 8)),
    "groups": ((8, 4, (3, 3)), {"feature_group_count": 4}, (2, 5, 5, 8)),
    "depthwise": ((4, 8, (3, 3)), {"feature_group_count": 4}, (2, 5, 5, 4)),
    "more batch axes": ((8, 4, (3, 3)), {}, (2, 3, 5, 5, 8)),
    "no batch axis": ((8, 4, (3, 3)), {}, (5, 5, 8)),
}


RARE = ("valid", "integer", "three dimensions", "groups", "more batch axes")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=SLOW if v in RARE else []) for v in CONVS])
@pytest.mark.parametrize("spec", [recipes.w8a8(), pytest.param(W8, marks=SLOW)], ids=["w8a8", "w8a16"])
def test_conv_variants(variant, spec):
    args, kwargs, shape = CONVS[variant]
    kwargs = {**kwargs, **inits(nnx.Conv)}
    layer = jq.nnx.QuantConv(*args, **kwargs, spec=spec, rngs=nnx.Rngs(0))
    theirs = nnx.Conv(*args, **kwargs, rngs=nnx.Rngs(0))
    q, x = frozen(layer), wavy(shape)
    nnx.update(theirs, dequantize_params(pure(q)))
    y = q(x)
    close(layer(x), y, 1e-6)
    close(y, theirs(x), 1e-4 if spec is W8 else 0.05)


@pytest.mark.parametrize("spec", [None, W8, recipes.w8a8()], ids=["none", "w8a16", "w8a8"])
def test_conv_mask(spec):
    mask = (jnp.arange(9 * 8 * 4) % 3 > 0).reshape(3, 3, 8, 4).astype(jnp.float32)
    layer = jq.nnx.QuantConv(8, 4, (3, 3), mask=mask, **inits(nnx.Conv), spec=spec, rngs=nnx.Rngs(0))
    x = wavy((2, 5, 5, 8))
    q = frozen(layer, rules=[jq.Rule("kernel", W8)]) if spec is None else frozen(layer)
    if spec is None:
        q._set_spec(None)
    theirs = nnx.Conv(8, 4, (3, 3), mask=mask, **inits(nnx.Conv), rngs=nnx.Rngs(0))
    nnx.update(theirs, dequantize_params(pure(q)))
    x_used = x
    if spec is not None and spec.act is not None:
        x_used = jq.fake_quant(x, spec.act, reduce_axes=(-3, -2, -1))
    close(q(x), theirs(x_used), 1e-4)
    if spec is not None:
        close(q(x), layer(x), 1e-6)


def test_conv_kernels_are_stored_as_convolutions_read_them():
    q = frozen(LAYERS["conv"].ours(spec=recipes.w8a8()))
    assert value(q.kernel).minor == ()
    assert value(frozen(LAYERS["linear"].ours(spec=W8)).kernel).minor == (-2,)


# -- embed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["w8a16", "nvfp4", *rarely("w4a16 grouped", "int2")])
@makes_nan
def test_lookup(spec):
    case = LAYERS["embed"]
    layer = case.ours(spec=SPECS[spec])
    q, index = frozen(layer), jnp.array([[1, 0, 6], [6, -1, 3]])
    np.testing.assert_array_equal(q(index), dequantize_params(value(q.embedding))[index])
    np.testing.assert_array_equal(layer(index), q(index))
    assert q(jnp.array([7])).shape == (1, 32)
    assert bool(jnp.isnan(q(jnp.array([7]))).all())  # out of bounds, as in Flax


def test_lookup_dtype_and_one_row():
    layer = jq.nnx.QuantEmbed(5, 32, **inits(nnx.Embed), dtype=jnp.bfloat16, spec=W8, rngs=nnx.Rngs(0))
    assert layer(jnp.array([1])).dtype == frozen(layer)(jnp.array([1])).dtype == jnp.bfloat16
    one = frozen(jq.nnx.QuantEmbed(1, 32, **inits(nnx.Embed), spec=W8, rngs=nnx.Rngs(0)))
    y = one(jnp.array([[0, 3]]))  # as in Flax, whatever the index
    np.testing.assert_array_equal(y, jnp.broadcast_to(value(one.embedding).dequantize(), (1, 2, 32)))


def test_a_spec_for_the_activation_alone_leaves_the_lookup_to_flax():
    case = LAYERS["embed"]
    layer = case.ours(spec=jq.OpSpec(act=jq.QuantSpec("int8")))
    np.testing.assert_array_equal(layer(jnp.array([2])), value(layer.embedding)[jnp.array([2])])


# -- static ranges ----------------------------------------------------------------------------------------------------


def test_static_range_follows_the_data_only_while_calibrating():
    layer = LAYERS["linear"].ours(spec=recipes.w8a8(static=True))
    x = LAYERS["linear"].x()
    assert set(pure(layer)) == {"kernel", "bias", "act_range"}
    assert set(pure(layer, jq.nnx.QuantStat)["act_range"]) == {"lo", "hi", "seen_absmax"}
    calibrated(layer, x, x / 2)
    peak = float(np.abs(x).max())
    assert float(value(layer.act_range.hi)) == pytest.approx(peak)
    layer(x * 10)
    assert float(value(layer.act_range.hi)) == pytest.approx(peak)
    calibrated(layer, x * 2)
    assert float(value(layer.act_range.hi)) == pytest.approx(2 * peak)


@pytest.mark.parametrize("observer", ["MinMax", "EMA", "MSE", *rarely("Percentile", "Entropy")])
def test_static_range_of_every_observer(observer):
    act = jq.QuantSpec(
        "uint8" if observer == "MinMax" else "int8",
        granularity="per_tensor",
        symmetric=observer != "MinMax",
        static=True,
        calibration=getattr(jq.observers, observer)(),
    )
    layer = LAYERS["linear"].ours(spec=jq.OpSpec(jq.QuantSpec("int8"), act))
    x = LAYERS["linear"].x()
    step = nnx.jit(lambda m, x: m(x))
    layer.set_attributes(calibrating=True)
    for batch in (x, x * 0.7):
        step(layer, batch)
    layer.set_attributes(calibrating=False)
    y = step(layer, x)
    want = x @ value(layer.kernel) + value(layer.bias)[None]
    close(y, want, 0.15 if observer == "EMA" else 0.05)  # the average clips the wider batch
    close(y, step(frozen(layer), x), 1e-6)


def test_static_range_is_part_of_the_saved_state():
    spec, x = recipes.w8a8(static=True), LAYERS["linear"].x()
    layer = calibrated(LAYERS["linear"].ours(spec=spec), x)
    other = jq.nnx.QuantLinear(32, 6, spec=spec, rngs=nnx.Rngs(1))
    nnx.update(other, pure(layer))
    np.testing.assert_array_equal(layer(x), other(x))


def test_static_table():
    case = LAYERS["embed"]
    layer = calibrated(case.ours(spec=recipes.w8a8(static=True)), case.x(), call=lambda m, x: m.attend(x))
    close(layer.attend(case.x()), frozen(layer).attend(case.x()), 1e-6)
    assert layer(jnp.array([1])).shape == (1, 32)  # a lookup has no activation


@needs_jit
@makes_nan
def test_a_range_that_was_never_observed_shows_under_jit():
    layer = LAYERS["linear"].ours(spec=recipes.w8a8(static=True))
    assert bool(jnp.isnan(nnx.jit(lambda m, x: m(x))(layer, LAYERS["linear"].x())).all())


# -- bad input --------------------------------------------------------------------------------------------------------


def _linear(**kwargs):
    return LAYERS["linear"].ours(**kwargs)


def _holding(shape, spec, layer=None, axes=(-2,)):
    layer = layer or _linear(spec=W8)
    assign(layer.kernel, jq.quantize(wavy(shape), spec, reduce_axes=axes))
    return layer


STATIC_PER_TOKEN = jq.OpSpec(act=jq.QuantSpec("int8", static=True))
X = wavy((3, 32))

BAD = {
    "spec is a QuantSpec": (lambda: _linear(spec=jq.QuantSpec("int8")), "QuantLinear: spec must be an OpSpec or None"),
    "spec is no recipe": (lambda: _linear(spec="w9a8"), r"unknown recipe; got recipe='w9a8'"),
    "static per token": (
        lambda: _linear(spec=STATIC_PER_TOKEN),
        "one for the whole activation",
    ),
    "static, not calibrated": (
        lambda: _linear(spec=recipes.w8a8(static=True))(X),
        r"QuantLinear at act_range: .* not known.*set_attributes\(calibrating=True\)",
    ),
    "static, only NaN seen": (
        lambda: calibrated(_linear(spec=recipes.w8a8(static=True)), X * jnp.nan)(X),
        "call the model on data that is finite",
    ),
    "shape of the QTensor": (
        lambda: _holding((16, 6), W8.weight)(X),
        r"QuantLinear at kernel: the weight must have shape \(32, 6\); got .*shape=\(16, 6\)",
    ),
    "transposed QTensor": (lambda: _holding((6, 32), W8.weight)(X), r"must have shape \(32, 6\)"),
    "stacked QTensor outside of scan": (lambda: _holding((2, 32, 6), W8.weight)(X), "inside nnx.scan or nnx.vmap"),
    "conv with another window": (
        lambda: _holding((5, 3, 8, 4), W8.weight, jq.nnx.QuantConv(8, 4, (3, 3), rngs=nnx.Rngs(0)))(wavy((1, 5, 5, 8))),
        r"QuantConv at kernel: .*\(3, 3, 8, 4\)",
    ),
    "table of another size": (
        lambda: (
            assign(
                (e := LAYERS["embed"].ours()).embedding,
                jq.quantize(wavy((8, 32)), present(W8.weight), reduce_axes=(-1,)),
            )
            or e(jnp.array([0]))
        ),
        "QuantEmbed at embedding",
    ),
    "QTensor of another type": (
        lambda: _holding((32, 6), jq.QuantSpec("int4"))(X),
        "quantized already, and not as its spec says",
    ),
    "group size": (lambda: _linear(spec=recipes.w4a16(group_size=12))(X), "group_size must divide the length 32"),
    "operation of the user": (
        lambda: _linear(spec=W8, dot_general=lambda *a, **k: None)(X),
        "has an operation of its own; dot_general is given",
    ),
    "operation of the user, quantized weight": (
        lambda: _holding((32, 6), W8.weight, _linear(dot_general=lambda *a, **k: None))(X),
        "Leave dot_general out, or neither give a spec nor quantize",
    ),
    "class of operations": (
        lambda: jq.nnx.QuantLinearGeneral(32, 6, dot_general_cls=object, spec=W8, rngs=nnx.Rngs(0))(X),
        "dot_general_cls is given",
    ),
    "integer input": (
        lambda: _linear(spec=recipes.w8a8(), promote_dtype=lambda a, **k: a)(jnp.ones((3, 32), int)),
        "the activation .* must be a float array",
    ),
    "stochastic rounding": (
        lambda: _linear(spec=jq.OpSpec(jq.QuantSpec("int8", rounding="stochastic")))(X),
        "ops round to nearest",
    ),
    "float indices": (lambda: frozen(LAYERS["embed"].ours(spec=W8))(X), "must be an integer"),
    "sharded table": (
        lambda: frozen(LAYERS["embed"].ours(spec=W8))(jnp.array([0]), out_sharding="x"),
        "QuantEmbed: out_sharding is for float weights",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    fn, message = BAD[name]
    with pytest.raises(ValueError if name == "float indices" else jq.QuantError, match=message):
        fn()


@pytest.mark.skipif("out_sharding" not in inspect.signature(nnx.Linear.__call__).parameters, reason="new in Flax 0.12")
def test_sharded_result():
    with pytest.raises(jq.QuantError, match="QuantLinear: out_sharding is for float weights"):
        _linear(spec=W8)(X, out_sharding=jax.sharding.PartitionSpec())
