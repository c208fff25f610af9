"""The leaf decides: a float weight trains, a QTensor runs, and the two compute the same."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax_settings import flax_promotes
from linen_cases import CASES, SPECS, assert_close, unequal
from narrowed import present

import jaxquant as jq
from jaxquant import recipes

OTHERS = [case for case in CASES if case != "dense"]
PAIRS = [("dense", spec) for spec in SPECS] + [(case, "w8a8") for case in OTHERS]
PAIRS += [(case, "w4a16") for case in ("dense_general", "conv-groups", "embed", "einsum")]
PAIRS += [(case, spec) for case in OTHERS for spec in ("w4a16", "w4a4", "nvfp4", "int2", "w8a8-static")]


def calibrated(case, layer, variables, x):
    if not layer.spec.act or not layer.spec.act.static or case.indices:
        return variables
    return {**variables, **layer.apply(variables, x, mutable=["quant"], method=case.method)[1]}


def agree(case, spec):
    """Training and frozen forward, and Flax's own layer on the same values, with its gradients."""
    layer, x = case.quant(spec=spec), case.inputs()
    variables = calibrated(case, layer, case.init(layer), x)
    frozen = case.freeze(variables, spec.weight)
    rest = {k: v for k, v in variables.items() if k != "params"}
    cotangent = jnp.asarray(
        np.random.default_rng(5).normal(size=jax.eval_shape(lambda: case.reference(spec, variables, x)).shape),
        jnp.float32,
    )

    def ours(params, x):
        return layer.apply({"params": params, **rest}, x, method=case.method)

    def theirs(params, x):
        return case.reference(spec, {"params": params}, x)

    @jax.jit
    def run(variables, frozen, x):
        out = {}
        for name, f in (("ours", ours), ("theirs", theirs)):
            if case.indices:
                y, pull = jax.vjp(lambda p, f=f: f(p, x), variables["params"])
            else:
                y, pull = jax.vjp(f, variables["params"], x)
            out[name] = y, pull(cotangent)
        return {"frozen": layer.apply(frozen, x, method=case.method), **out}

    out = run(variables, frozen, x)
    assert_close(out["ours"][0], out["frozen"])
    # The float product of the same values; weight-only products have 2 int8 digits.
    assert_close(out["ours"][0], out["theirs"][0], 2e-4)
    for ours_, theirs_ in zip(*(jax.tree.leaves(out[name][1]) for name in ("ours", "theirs")), strict=True):
        assert_close(ours_, theirs_)


@pytest.mark.parametrize("case, spec", list(dict.fromkeys(PAIRS)))
def test_trained_and_frozen_agree(case, spec):
    agree(CASES[case], SPECS[spec])


@pytest.mark.parametrize("name", CASES)
def test_without_a_spec_a_qtensor_is_weight_only(name):
    case = CASES[name]
    layer, x = case.quant(), case.inputs()
    variables = case.init(layer)
    frozen = case.freeze(variables, jq.QuantSpec("int4", symmetric=False))
    want = case.reference(jq.OpSpec(jq.QuantSpec("int4", symmetric=False)), variables, x)
    assert_close(jax.jit(lambda v: layer.apply(v, x, method=case.method))(frozen), want, 2e-4)


@pytest.mark.parametrize("name", ["dense", "dense_general-batch", "conv", "embed", "attend", "einsum"])
def test_bfloat16_compute_quantizes_the_stored_weight(name):
    """Codes come from the float32 parameter, in training as in quantize_params, so the two agree in bfloat16 too."""
    case, spec = CASES[name], recipes.w8a8()
    layer, x = case.quant(spec=spec, dtype=jnp.bfloat16), case.inputs()
    variables = case.init(layer)
    frozen = case.freeze(variables, spec.weight)
    trained, ran = jax.jit(lambda *vs: [layer.apply(v, x, method=case.method) for v in vs])(variables, frozen)
    assert trained.dtype == ran.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(trained, np.float32), np.asarray(ran, np.float32))
    assert_close(trained, case.reference(spec, variables, x), 0.03)
    apply: Any = functools.partial(layer.apply, method=case.method)
    gradient = jax.jit(jax.grad(lambda p: apply({"params": p}, x).astype("float32").sum()))
    for leaf in jax.tree.leaves(gradient(variables["params"])):
        assert leaf.dtype == jnp.float32
        assert bool(jnp.all(jnp.isfinite(leaf)))


@flax_promotes
def test_bfloat16_params():
    spec = recipes.w4a16(group_size=32)
    layer: Any = jq.linen.QuantDense(6, spec=spec, param_dtype=jnp.bfloat16)
    x = unequal((3, 64)).astype(jnp.bfloat16)
    params = {"kernel": unequal((64, 6), 1).astype(jnp.bfloat16), "bias": jnp.ones(6, jnp.bfloat16)}
    frozen = {**params, "kernel": jq.quantize(params["kernel"], present(spec.weight), reduce_axes=(-2,))}
    for dtype in (jnp.bfloat16, jnp.float32):
        trained, ran = (layer.apply({"params": p}, x.astype(dtype)) for p in (params, frozen))
        assert trained.dtype == ran.dtype == dtype
        assert_close(trained, ran, 1e-6)


def test_an_activation_spec_alone():
    case = CASES["dense"]
    spec = jq.OpSpec(act=jq.QuantSpec("int8"))
    layer, x = case.quant(spec=spec), case.inputs()
    variables = case.init(layer)
    assert_close(layer.apply(variables, x), case.reference(spec, variables, x), 2e-4)


class Model(nn.Module):
    """Lookup, convolution, dense and a tied head."""

    spec: jq.OpSpec

    @nn.compact
    def __call__(self, tokens):
        embed = jq.linen.QuantEmbed(11, 32, spec=self.spec)
        x = embed(tokens)
        x = nn.relu(jq.linen.QuantConv(32, (3,), spec=self.spec)(x))
        x = x + jq.linen.QuantDense(32, spec=self.spec)(nn.LayerNorm()(x))
        return embed.attend(x)


@pytest.mark.parametrize("name", ["w4a8", "w8a8-static"])
def test_quantize_params_keeps_the_logits(name):
    spec = SPECS[name]
    model, tokens = Model(spec), jnp.asarray(np.random.default_rng(3).integers(0, 11, (4, 6)))
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    if present(spec.act).static:
        _, seen = jax.jit(lambda v: model.apply(v, tokens, mutable=["quant"]))(variables)
        variables = {**variables, **seen}
    frozen = {**variables, "params": jq.quantize_params(variables["params"], [jq.Rule(".*", spec)])}
    kernels = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_qtensor) if is_qtensor(leaf)]
    assert len(kernels) == 3
    trained, ran = jax.jit(lambda *vs: [model.apply(v, tokens) for v in vs])(variables, frozen)
    assert_close(ran, trained)


def is_qtensor(x):
    return isinstance(x, jq.QTensor)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16:g32:asym", "fp8", "nvfp4"])
def test_flax_serializes_quantized_params(recipe):
    params = {"kernel": jnp.sin(jnp.arange(64.0 * 8)).reshape(64, 8), "bias": jnp.ones(8)}
    plan = jq.make_plan(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 64)), rules=[jq.Rule("kernel", recipe)])
    quantized = jq.quantize_params(params, plan)
    other = jq.quantize_params(jax.tree.map(jnp.zeros_like, params), plan)
    again = serialization.from_bytes(other, serialization.to_bytes(quantized))
    assert again["kernel"].qtype == quantized["kernel"].qtype
    jax.tree.map(np.testing.assert_array_equal, again, quantized)
    shifted = jq.quantize(params["kernel"], jq.QuantSpec("uint8", symmetric=False), reduce_axes=(-2,))
    saved = serialization.to_bytes({"kernel": jq.quantize(params["kernel"], jq.QuantSpec("int8"), reduce_axes=(-2,))})
    spec = {name: jq.QuantSpec(name, granularity="per_group", group_size=32) for name in ("nf4", "fp4")}
    nf4, fp4 = (jq.quantize(params["kernel"], spec[name], reduce_axes=(-2,)) for name in ("nf4", "fp4"))
    for target, state in (
        (shifted, saved),
        (fp4, serialization.to_bytes({"kernel": nf4})),
        (fp4, serialization.to_bytes({"kernel": params["kernel"]})),
    ):
        with pytest.raises(jq.QuantError, match="quantized in another way than the saved params"):
            serialization.from_bytes({"kernel": target}, state)
