"""Which leaves an optimizer may see."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_settings import optax_promotes

import jaxquant as jq
from jaxquant import qat

W = jnp.linspace(-1.0, 1.0, 64 * 4, dtype=jnp.float32).reshape(64, 4)
TYPES = ["int8", "int4", "int2", "float8_e4m3fn", "nf4", "mxfp8", "mxfp4", "nvfp4"]


def mixed(qtype="int8"):
    kernel = jq.quantize(W, jq.QuantSpec(qtype), reduce_axes=(-2,))
    return {"frozen": {"bias": jnp.ones(4, jnp.float32), "kernel": kernel}, "float": {"kernel": W}}


@pytest.mark.parametrize("qtype", TYPES)
def test_the_mask_is_true_for_float_leaves_alone(qtype):
    params = {**mixed(qtype), "steps": jnp.int32(3), "none": None}
    mask = qat.trainable(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert mask["frozen"]["bias"] is True
    assert mask["float"]["kernel"] is True
    assert mask["steps"] is False
    assert not any(jax.tree.leaves(mask["frozen"]["kernel"]))  # fp8 codes and scales included


@pytest.mark.parametrize("qtype", TYPES)
def test_quantized_leaves_are_refused_by_name(qtype):
    params = mixed(qtype)
    tx = qat.refuse_quantized(optax.adamw(1e-3))
    for f in (qat.check_trainable, tx.init):
        with pytest.raises(jq.QuantError, match=r"check_trainable at frozen/kernel: .*freeze_quantized"):
            f(params)
    with pytest.raises(jq.QuantError, match="check_trainable at 1: "):
        qat.check_trainable([W, jnp.arange(3)])


@optax_promotes
def test_refusing_changes_nothing_for_float_params():
    params = {"kernel": W, "bias": jnp.ones(4, jnp.bfloat16)}
    tx, plain = qat.refuse_quantized(optax.adamw(1e-3)), optax.adamw(1e-3)
    state = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(params))
    updates, _ = tx.update(params, state, params)
    want, _ = plain.update(params, plain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, want)


def test_masks_take_quantized_leaves_out():
    """optax.masked and optax.multi_transform understand the mask; what a mask took out is not refused."""
    params = mixed()
    state = optax.masked(qat.refuse_quantized(optax.adam(1e-3)), qat.trainable).init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(m.shape for m in moments) == [(4,), (4,), (64, 4), (64, 4)]
    labels = jax.tree.map(lambda t: "train" if t else "fix", qat.trainable(params))
    tx = optax.multi_transform({"train": optax.sgd(0.1), "fix": optax.set_to_zero()}, labels)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    got: Any = optax.apply_updates(params, updates)
    np.testing.assert_allclose(got["float"]["kernel"], W - 0.1, atol=1e-6)
    np.testing.assert_array_equal(got["frozen"]["kernel"].codes, params["frozen"]["kernel"].codes)


@pytest.mark.parametrize("qtype", TYPES)
@optax_promotes
def test_frozen_leaves_stay_bit_for_bit(qtype):
    params = {**mixed(qtype), "steps": jnp.int32(3)}
    tx = qat.freeze_quantized(optax.adamw(1e-2))
    state = tx.init(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)

    @jax.jit
    def step(params, state):
        def loss(p):
            return jnp.sum(p["frozen"]["kernel"].dequantize() * p["float"]["kernel"]) + jnp.sum(p["frozen"]["bias"])

        gradient = jax.grad(loss, allow_int=True)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    new, state = step(params, state)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for of in (lambda p: p["steps"], lambda p: p["frozen"]["kernel"]):
        before, after = of(params), of(new)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert bool(jnp.all(new["frozen"]["bias"] < params["frozen"]["bias"]))
    step(new, state)  # and again, with the state that came back


@optax_promotes
def test_freezing_changes_nothing_for_float_params():
    params = {"kernel": W, "bias": jnp.ones(4)}
    tx, plain = qat.freeze_quantized(optax.adamw(1e-3)), optax.adamw(1e-3)
    state = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(params))
    jax.tree.map(
        np.testing.assert_array_equal,
        tx.update(params, state, params),
        plain.update(params, plain.init(params), params),
    )


@optax_promotes
def test_extra_arguments_reach_the_optimizer():
    tx = qat.freeze_quantized(optax.contrib.reduce_on_plateau(factor=0.5))
    params = mixed()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, value=jnp.float32(1))
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_freezing_needs_the_params():
    tx = qat.freeze_quantized(optax.sgd(0.1))
    with pytest.raises(jq.QuantError, match="freeze_quantized: update needs the parameters"):
        tx.update({"w": W}, tx.init({"w": W}))


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(optax.constant_schedule(0.1), momentum=0.9),
    "adam": lambda: optax.adam(1e-3),
    "lion": lambda: optax.lion(1e-3),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_meets_gradients_of_codes_raises(name, wrap):
    params = mixed()
    gradient = jax.grad(
        lambda p: jnp.sum(p["frozen"]["kernel"].dequantize()) + jnp.sum(p["frozen"]["bias"]), allow_int=True
    )(params)
    tx = OPTIMIZERS[name]()
    with pytest.raises(jq.QuantError, match=r"codes are integers and have no gradient.*qat.split"):
        wrap(tx.update)(gradient, tx.init(params), params)


def test_gradients_of_codes_pass_through_jax():
    kernel = mixed()["frozen"]["kernel"]

    def loss(q):
        return jnp.sum(q.dequantize() ** 2)

    plain = jax.grad(loss, allow_int=True)(kernel)
    for gradient in (
        jax.jit(jax.grad(loss, allow_int=True))(kernel),
        jax.jit(lambda g: g)(plain),
        jax.device_put(plain),
    ):
        assert gradient.kept.dtype == jax.dtypes.float0
        assert gradient.kept.shape == kernel.kept.shape
        np.testing.assert_allclose(gradient.scale, plain.scale, rtol=1e-6)
    assert jax.eval_shape(lambda g: g, plain).kept.dtype == jax.dtypes.float0
    _, tangent = jax.jvp(loss, (kernel,), (plain,))  # the squared norm of the gradient in the scales
    np.testing.assert_allclose(tangent, jnp.sum(plain.scale**2), rtol=1e-5)


def test_jax_refuses_gradients_of_integer_leaves():
    """The first line of defence is JAX's own, and it has to stay."""
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(lambda p: jnp.sum(p["frozen"]["kernel"].dequantize()))(mixed())


@pytest.mark.parametrize("qtype", TYPES)
@optax_promotes
def test_split_and_merge(qtype):
    """Any optimizer trains the one half; both together are the parameters, bit for bit."""
    params = {**mixed(qtype), "steps": jnp.int32(3), "none": None}
    trained, frozen = qat.split(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    assert trained["frozen"]["kernel"] is None
    assert frozen["float"]["kernel"] is None
    same = qat.merge(trained, frozen)
    assert jax.tree.structure(same) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))

    def loss(trained):
        p = qat.merge(trained, frozen)
        return jnp.sum((p["frozen"]["kernel"].dequantize() + p["float"]["kernel"]) ** 2) + jnp.sum(p["frozen"]["bias"])

    tx = optax.adam(0.1)
    grads = jax.grad(loss)(trained)
    updates, _ = tx.update(grads, tx.init(trained), trained)
    after = qat.merge(optax.apply_updates(trained, updates), frozen)
    np.testing.assert_allclose(after["frozen"]["bias"], 0.9, rtol=1e-5)  # a first step of Adam is the learning rate
    want = 2 * (params["frozen"]["kernel"].dequantize() + W)
    np.testing.assert_allclose(grads["float"]["kernel"], want, rtol=1e-6)
    with pytest.raises(jq.QuantError, match="merge at float/kernel: a leaf both trains and is frozen"):
        qat.merge(trained, params)


def test_gradients_of_integers_are_named():
    params = mixed()
    tx = qat.refuse_quantized(optax.sgd(0.1))
    grads = jax.grad(lambda p: jnp.sum(p["frozen"]["kernel"].dequantize()), allow_int=True)(params)
    with pytest.raises(jq.QuantError, match=r"frozen/kernel/codes: integers have no gradients.*qat.split"):
        tx.update(grads, optax.sgd(0.1).init(W))


#: Transformations that end in an error of JAX's where they are given float0 zeros and nothing wraps them.
FIRST = {
    "clip": lambda: optax.clip(1.0),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "normalize_by_update_norm": lambda: optax.normalize_by_update_norm(),
    "zero_nans": lambda: optax.zero_nans(),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 0.5),
    "scale_by_trust_ratio": lambda: optax.scale_by_trust_ratio(),
    "scale_by_factored_rms": lambda: optax.scale_by_factored_rms(),
    "several steps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
}


@pytest.mark.every
@pytest.mark.parametrize("name", FIRST)
@optax_promotes
def test_whatever_comes_first(name):
    """Frozen leaves are kept, and refused ones named, before any transformation computes with their gradients."""
    params, tx = mixed(), FIRST[name]()
    grads = jax.grad(lambda p: jnp.sum(p["frozen"]["kernel"].dequantize()), allow_int=True)(params)
    freeze, refuse = qat.freeze_quantized(tx), qat.refuse_quantized(tx)
    updates, _ = freeze.update(grads, freeze.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["frozen"]["kernel"].codes, params["frozen"]["kernel"].codes)
    with pytest.raises(jq.QuantError, match="frozen/kernel/codes: integers have no gradients"):
        refuse.update(grads, refuse.init({"w": W}), params)


def test_what_is_no_transformation():
    wrong: Any = optax.adam
    for wrap in (qat.refuse_quantized, qat.freeze_quantized):
        with pytest.raises(jq.QuantError, match=f"{wrap.__name__}: it takes an Optax transformation.*optax.adam"):
            wrap(wrong)
