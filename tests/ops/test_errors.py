"""Every refused call says which function, which rule, what it got and what to do."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from narrowed import untyped
from ops_reference import MATMUL, quantized, spec_of

from jaxquant import OpSpec, QuantError, QuantSpec, ops, recipes

pytestmark = pytest.mark.every

X, W = jnp.ones((4, 16)), jnp.ones((16, 6))
IMAGE, KERNEL = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
Q = quantized(W, spec_of("int8"))
STATIC = recipes.w8a8(static=True)
W8A8 = recipes.w8a8()
NHWC = ("NHWC", "HWIO", "NHWC")


def dot(x: Any = X, w: Any = W, numbers=MATMUL, *args, spec: Any = W8A8, **kwargs):
    return ops.dot_general(x, w, numbers, *args, spec=spec, **kwargs)


def conv(x=IMAGE, k: Any = KERNEL, strides=(1, 1), padding="SAME", *args, spec: Any = W8A8, numbers=NHWC, **kwargs):
    return ops.conv_general_dilated(x, k, strides, padding, *args, dimension_numbers=numbers, spec=spec, **kwargs)


BAD = {
    "type of the QTensor": (lambda: dot(w=Q, spec=recipes.w4a8(None)), "not as its spec says"),
    "symmetry of the QTensor": (
        lambda: dot(w=Q, spec=OpSpec(spec_of("int8", symmetric=False))),
        "not as its spec says",
    ),
    "quantized activation of another type": (
        lambda: dot(x=quantized(X, spec_of("int4"), (-1,)), w=Q),
        "the activation .* is quantized already",
    ),
    "spec is a QuantSpec": (lambda: dot(spec=spec_of("int8")), "spec must be an OpSpec"),
    "spec is a name": (lambda: dot(spec="w8a8"), "spec must be an OpSpec"),
    "integer activation": (lambda: dot(x=jnp.ones((4, 16), jnp.int32)), "must be a float array"),
    "integer weight": (lambda: dot(w=jnp.ones((16, 6), jnp.int8)), "must be a float array"),
    "complex activation": (lambda: dot(x=X.astype(complex), w=Q, spec=None), "is a float array"),
    "integer result": (lambda: dot(preferred_element_type=jnp.int32), "is a float array"),
    "None": (lambda: dot(x=None), "must be an array or a QTensor"),
    "text": (lambda: dot(w="weight"), "must be an array or a QTensor"),
    "a list of names": (lambda: dot(w=["weight"]), "must be an array or a QTensor"),
    "a shape": (lambda: dot(x=jax.ShapeDtypeStruct((4, 16), jnp.float32)), "must be an array or a QTensor"),
    "stochastic rounding": (lambda: dot(spec=OpSpec(QuantSpec("int8", rounding="stochastic"))), "round to nearest"),
    "no static range": (lambda: dot(spec=STATIC), "a static activation range is needed"),
    "zero point alone": (lambda: dot(act_zero_point=3), "a static activation range is needed"),
    "zero point for a symmetric spec": (
        lambda: dot(spec=STATIC, act_scale=1.0, act_zero_point=3),
        "does not fit the spec",
    ),
    "no zero point": (lambda: dot(spec=recipes.w8a8(static=True, act_symmetric=False), act_scale=1.0), "does not fit"),
    "scale of a wrong shape": (lambda: dot(spec=STATIC, act_scale=jnp.ones(4)), "one entry per block"),
    "scale without spec": (lambda: dot(spec=None, act_scale=1.0), "act_scale without an activation"),
    "zero point without spec": (lambda: dot(spec=None, act_zero_point=1), "act_zero_point without an activation"),
    "scale and a QTensor alone": (lambda: dot(w=Q, spec=None, act_scale=1.0), "act_scale without an activation"),
    "scale in einsum": (lambda: ops.einsum("ij,jk", X, W, act_scale=1.0), "act_scale without an activation"),
    "scale in a convolution": (lambda: conv(spec=None, act_scale=1.0), "act_scale without an activation"),
    "dimension numbers of the wrong form": (lambda: dot(numbers=((1,), (0,))), "wrong form"),
    "dimension numbers are no numbers": (lambda: dot(numbers=((("a",), (0,)), ((), ()))), "wrong form"),
    "fractional axis": (lambda: dot(numbers=(((1.0,), (0,)), ((), ()))), "wrong form"),
    "unpaired axes": (lambda: dot(numbers=(((0, 1), (0,)), ((), ()))), "must pair axes"),
    "repeated axis": (lambda: dot(numbers=(((1,), (0,)), ((1,), (1,)))), "repeat an axis"),
    "missing axis": (lambda: dot(numbers=(((2,), (0,)), ((), ()))), "repeat an axis or name one that does not exist"),
    "shapes that do not match": (lambda: dot(numbers=(((0,), (0,)), ((), ()))), "must have one size"),
    "group size that does not divide": (lambda: dot(spec=recipes.w4a16(5)), "group_size must divide"),
    "activation's group size": (lambda: dot(spec=recipes.w4a4(5)), "group_size must divide"),
    "groups of nothing": (
        lambda: dot(numbers=(((), ()), ((), ())), spec=recipes.w4a16(2)),
        "at least one reduced axis",
    ),
    "unknown precision": (lambda: dot(precision="exact"), "unknown precision"),
    "three precisions": (lambda: dot(precision=["highest"] * 3), "unknown precision"),
    "sharding of a quantized product": (lambda: dot(out_sharding="d"), "out_sharding is for float operands"),
    "unknown subscript": (lambda: ops.einsum("ij,jk->iz", X, Q), "unknown subscript"),
    "three operands": (lambda: ops.einsum("ij,jk,kl->il", X, Q, W), "two operands"),
    "operands and lists": (lambda: untyped.ops.einsum(X, [0, 1], Q, [1, 2]), "two operands"),
    "subscripts that are no text": (lambda: untyped.ops.einsum(7, X, Q), "as a string"),
    "einsum spec": (lambda: untyped.ops.einsum("ij,jk->ik", X, W, spec=spec_of("int8")), "spec must be an OpSpec"),
    "einsum without a static range": (lambda: ops.einsum("ij,jk->ik", X, W, spec=STATIC), "static activation range"),
    "einsum group size": (lambda: ops.einsum("ij,jk->ik", X, W, spec=recipes.w4a16(5)), "group_size must divide"),
    "convolution of other channels": (lambda: conv(k=jnp.ones((3, 3, 2, 4))), "feature dimension size"),
    "convolution strides": (lambda: conv(strides=(1,)), "window_strides"),
    "convolution padding": (lambda: conv(padding="FULL"), "padding"),
    "convolution layout": (lambda: conv(numbers=("NHWC", "HWIO")), "."),
    "convolution layout of other axes": (lambda: conv(numbers=("NHWZ", "HWIO", "NHWC")), "."),
    "convolution group size": (lambda: conv(spec=recipes.w4a16(5)), "group_size must divide"),
    "convolution without a static range": (lambda: conv(spec=STATIC), "static activation range"),
    "convolution of a QTensor": (lambda: conv(k=quantized(KERNEL, spec_of("int4"), (0, 1, 2))), "not as its spec"),
    "convolution of None": (lambda: conv(k=None), "must be an array or a QTensor"),
    "float indices": (lambda: ops.take(Q, jnp.ones(3), 0), "indices must be integers"),
    "boolean indices": (lambda: ops.take(Q, jnp.ones(3, bool), 0), "indices must be integers"),
    "a QTensor of indices": (lambda: untyped.ops.take(Q, Q, 0), "indices must be integers"),
    "axis None": (lambda: ops.take(Q, jnp.arange(2)), "needs an axis"),
    "axis too large": (lambda: ops.take(Q, jnp.arange(2), 2), "needs an axis"),
    "axis is True": (lambda: ops.take(Q, jnp.arange(2), True), "needs an axis"),
    "fractional axis of take": (lambda: untyped.ops.take(W, jnp.arange(2), 0.5, spec=W8A8), "needs an axis"),
    "unknown mode": (lambda: ops.take(Q, jnp.arange(2), 0, mode="raise"), "unknown mode"),
    "take spec": (lambda: untyped.ops.take(W, jnp.arange(2), 0, spec=spec_of("int8")), "spec must be an OpSpec"),
    "take of another type": (lambda: ops.take(Q, jnp.arange(2), 0, spec=recipes.w4a16(None)), "not as its spec"),
    "take of integers": (lambda: ops.take(jnp.arange(4), jnp.arange(2), 0, spec=W8A8), "must be a float array"),
    "take with bad reduced axes": (lambda: ops.take(W, jnp.arange(2), 0, spec=W8A8, reduce_axes=(5,)), "reduce_axes"),
    "take group size": (lambda: ops.take(W, jnp.arange(2), 0, spec=recipes.w4a16(5)), "group_size must divide"),
    "take from nothing": (lambda: ops.take(jnp.ones((0, 4)), jnp.arange(2), 0, spec=W8A8), "nothing to index"),
}
FUNCTIONS = r"(dot_general|einsum|conv_general_dilated|take)"


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    call, rule = BAD[name]
    with pytest.raises(QuantError, match=rule) as caught:
        call()
    message = str(caught.value)
    assert re.fullmatch(rf"{FUNCTIONS}( at \S+)?: [^;]+; got \w+=.*\. [A-Z].*\.", message, re.DOTALL), message


@pytest.mark.parametrize("name", ["einsum without a static range", "einsum group size", "einsum spec"])
def test_the_function_that_was_called_is_named(name):
    with pytest.raises(QuantError, match=r"^einsum: "):
        BAD[name][0]()


def test_refused_under_jit_too():
    with pytest.raises(QuantError, match="a static activation range"):
        jax.jit(lambda x: dot(x, spec=STATIC))(X)
