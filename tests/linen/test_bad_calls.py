"""What the layers refuse: the place, the value and the way out, in one line."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax_settings import flax_promotes
from linen_cases import unequal
from narrowed import untyped

import jaxquant as jq
from jaxquant import recipes

pytestmark = pytest.mark.every

X = unequal((2, 32))
W = unequal((32, 6), 1)
B = jnp.ones(6)
INT8, INT4 = jq.QuantSpec("int8"), jq.QuantSpec("int4")
Dense = jq.linen.QuantDense


def q(w=W, spec=INT8, axes=(-2,)):
    """What makes a weight: when a test runs, not when it is collected."""
    return lambda: jq.quantize(w, spec, reduce_axes=axes)


def run(layer, x=X, method="__call__", **params):
    made = lambda p: p() if callable(p) else p  # noqa: E731
    return lambda: layer.apply({"params": {k: made(p) for k, p in params.items()}}, x, method=method)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dense(32), Dense(6, spec=recipes.w4a16(group_size=5))])(x)


MIXED = "integers where a spec wants floats"
CALLS = {
    "a spec that is a QuantSpec": (
        lambda: untyped.linen.QuantDense(6, spec=INT8),
        "QuantDense: spec must be an OpSpec or None; got spec=",
    ),
    "a spec that is a string": (
        lambda: jq.linen.QuantConv(6, 3, spec="int8"),
        "recipe: unknown recipe; got recipe='int8'",
    ),
    "a spec that is a number": (lambda: untyped.linen.QuantConv(6, 3, spec=8), "QuantConv: spec must be an OpSpec"),
    "a static range per token": (
        lambda: Dense(6, spec=jq.OpSpec(INT8, jq.QuantSpec("int8", static=True))),
        r"a static range is one for the whole activation; .*Use granularity=PerTensor\(\)",
    ),
    "a static range per group": (
        lambda: jq.linen.QuantEmbed(3, 32, spec=jq.OpSpec(INT8, jq.QuantSpec("mxfp4", static=True))),
        "QuantEmbed: a static range is one for the whole activation",
    ),
    "a kernel of another width": (
        run(Dense(6), kernel=q(unequal((16, 6))), bias=B),
        r"QuantDense at params/kernel: the weight must have shape \(32, 6\); got .*shape=\(16, 6\)\. Quantize",
    ),
    "a kernel of another layer kind": (
        run(jq.linen.QuantConv(6, 3), X[None], kernel=q(), bias=B),
        r"QuantConv at params/kernel: the weight must have shape \(3, 32, 6\)",
    ),
    "a stacked kernel outside a scan": (
        run(Dense(6), kernel=lambda: jax.vmap(lambda w: q(w)())(jnp.stack([W, W])), bias=B),
        r"the weight must have shape \(32, 6\).*stacked params",
    ),
    "an embedding with rows and features swapped": (
        run(jq.linen.QuantEmbed(6, 32), jnp.array([1]), embedding=q()),
        r"QuantEmbed at params/embedding: the weight must have shape \(6, 32\)",
    ),
    "an einsum kernel of another shape": (
        run(jq.linen.QuantEinsum((32, 3, 2), "bd,dhk->bhk"), kernel=q(), bias=jnp.ones((3, 2))),
        r"QuantEinsum at params/kernel: the weight must have shape \(32, 3, 2\)",
    ),
    "a quantized bias": (
        run(Dense(6), kernel=q(), bias=q(B, axes=(-1,))),
        "QuantDense at params/bias: this parameter must be float; .*Quantize only 'kernel'",
    ),
    "a type that is not the spec's": (
        run(Dense(6, spec=recipes.w8a8()), kernel=q(spec=INT4), bias=B),
        "dot_general at params/kernel: the weight .*quantized already, and not as its spec says",
    ),
    "a zero point that the spec does not have": (
        run(Dense(6, spec=jq.OpSpec(INT4)), kernel=q(spec=jq.QuantSpec("int4", symmetric=False)), bias=B),
        "dot_general at params/kernel: .*not as its spec says",
    ),
    "groups that do not divide": (
        lambda: Dense(6, spec=recipes.w4a16(group_size=5)).init(jax.random.key(0), X),
        "dot_general at params/kernel: group_size must divide the length 32",
    ),
    "groups that do not divide, far inside": (
        lambda: Nested().init(jax.random.key(0), X),
        "dot_general at params/Dense_1/kernel: group_size must divide",
    ),
    "groups of the activation that do not divide": (
        run(Dense(6, spec=recipes.w4a4(group_size=24)), kernel=W, bias=B),
        "dot_general at params/kernel: group_size must divide",
    ),
    "groups that do not divide the features of a table": (
        run(jq.linen.QuantEmbed(6, 32, spec=recipes.w4a16(group_size=5)), jnp.array([1]), embedding=W.T),
        "take at params/embedding: group_size must divide",
    ),
    "groups that do not divide a masked kernel": (
        run(
            jq.linen.QuantConv(6, 1, spec=recipes.w4a16(group_size=5), mask=jnp.ones((1, 32, 6))),
            X[None],
            kernel=W[None],
            bias=B,
        ),
        "fake_quant at params/kernel: group_size must divide",
    ),
    "stochastic rounding": (
        run(Dense(6, spec=jq.OpSpec(jq.QuantSpec("int8", rounding="stochastic"))), kernel=W, bias=B),
        "dot_general at params/kernel: ops round to nearest",
    ),
    "a product of the user's": (
        run(Dense(6, spec=recipes.w8a8(), dot_general=jax.lax.dot_general), kernel=W, bias=B),
        "QuantDense at params/kernel: a quantized layer has a product of its own; .*Leave dot_general out",
    ),
    "a product of the user's, on a frozen kernel": (
        run(
            jq.linen.QuantConv(6, 1, conv_general_dilated_cls=lambda: None),
            X[None],
            kernel=q(W[None], axes=(0, 1)),
            bias=B,
        ),
        "Leave conv_general_dilated_cls out",
    ),
    "an einsum without a result": (
        run(jq.linen.QuantEinsum((32, 6), "bd,dh"), kernel=W, bias=B),
        "QuantEinsum: einsum_str needs two operands and an explicit result; got einsum_str='bd,dh'",
    ),
    "an einsum of one operand": (run(jq.linen.QuantEinsum((32, 6), "bd->b"), kernel=W, bias=B), "two operands"),
    "an einsum that repeats a subscript": (
        run(jq.linen.QuantEinsum((32, 32), "bd,dd->bd", spec=recipes.w8a8(), use_bias=False), kernel=unequal((32, 32))),
        "einsum at params/kernel: quantized einsum takes no repeated subscripts",
    ),
    "the state of another observer": (
        lambda: Dense(6, spec=recipes.w8a8(static=True)).apply(
            {"params": {"kernel": W, "bias": B}, "quant": {"act": {"lo": -1.0, "hi": 1.0, "seen": {"lo": B, "hi": B}}}},
            X,
            mutable=["quant"],
        ),
        r"QuantDense at params/kernel: .*no state of this observer; got observer=AbsMax\(\)\. Calibrate again",
    ),
    "no calibration": (
        run(Dense(6, spec=recipes.w8a8(static=True)), kernel=q(), bias=B),
        r"QuantDense at params/kernel: the static range of the activation is not known.*mutable=\['quant'\]",
    ),
    MIXED: (
        run(Dense(6, spec=recipes.w8a8()), kernel=W.astype(jnp.int32), bias=B),
        "dot_general at params/kernel: the weight .*must be a float array",
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=flax_promotes if name == MIXED else ()) for name in CALLS])
def test_bad_calls(name):
    call, message = CALLS[name]
    with pytest.raises(jq.QuantError, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).endswith(".")


def test_what_flax_refuses_stays_as_flax_has_it():
    with pytest.raises(flax.errors.CallCompactUnboundModuleError):
        Dense(6, spec=recipes.w8a8())(X)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        run(Dense(6, spec=recipes.w8a8()), kernel=W[:16], bias=B)()
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        run(Dense(6, spec=recipes.w8a8()), bias=B)()
    with pytest.raises(ValueError, match="must be an integer"):
        run(jq.linen.QuantEmbed(6, 32), X, embedding=W.T)()
