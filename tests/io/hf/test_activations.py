"""Directories that say how activations are quantized run as they were saved: against NumPy."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_files import checkpoint

import jaxquant as jq
from jaxquant.core.specs import QuantSpec

pytestmark = pytest.mark.every

FP8 = ml_dtypes.float8_e4m3fn
OUT, IN = 6, 64
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(5, IN)) * np.exp(RNG.normal(size=(5, 1)))).astype(np.float32)
CODES = RNG.integers(-127, 128, (OUT, IN)).astype(np.int8)
SMALL = RNG.normal(size=(OUT, IN)).astype(FP8)
SCALE = np.exp(RNG.normal(size=(OUT, 1))).astype(np.float32)


def product(params, x):
    return jax.lax.dot_general(x, params["m.weight"], (((1,), (1,)), ((), ())))


# -- what activations become, in NumPy ---------------------------------------------------------------------------------


def on_int8(x, scale, zero=0, least=-128):
    return (np.clip(np.rint(x / scale) + zero, least, 127) - zero) * scale


def on_fp8(x, scale):
    return np.clip(x / scale, -448, 448).astype(FP8).astype(np.float32) * scale


def per_token(x):
    return np.abs(x).max(-1, keepdims=True)


def in_groups(x, size):
    groups = x.reshape(len(x), -1, size)
    return on_fp8(groups, per_token(groups) / np.float32(448)).reshape(x.shape)


def asymmetric(x):
    lo, hi = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = ((hi - lo) / np.float32(255)).astype(np.float32)
    return on_int8(x, scale, np.rint(-128 - lo / scale))


def without_outliers(x, threshold=6.0):
    """LLM.int8(): columns with an outlier in float, the rest by the largest magnitude of what is left."""
    outliers = (np.abs(x) >= threshold).any(0)
    rest = np.where(outliers, 0, x)
    return np.where(outliers, x, on_int8(rest, per_token(rest) / np.float32(127), least=-127))


def grouped(x, **activations):
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **x}


def named(**parts):
    return {f"m.{name}": value for name, value in parts.items()}


INT8 = named(weight=CODES, weight_scale=SCALE)
FLOAT8 = named(weight=SMALL, weight_scale=SCALE)
ONE = named(weight=SMALL, weight_scale=np.float32(0.3))
STATIC = np.float32(0.04)
INT8_W, FP8_W = CODES * SCALE, SMALL.astype(np.float32) * SCALE
ONE_W = SMALL.astype(np.float32) * np.float32(0.3)
BLOCKS = np.exp(RNG.normal(size=(2, 2))).astype(np.float32)
BLOCK_W = SMALL.astype(np.float32) * np.repeat(np.repeat(BLOCKS, 3, 0), 32, 1)
INT = {"num_bits": 8, "type": "int", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}

#: Name -> (tensors, quantization configuration, the weight, what the activations become).
SCHEMES = {
    "int8 per token": (
        INT8, grouped({}, **INT, strategy="token", dynamic=True), INT8_W,
        lambda x: on_int8(x, per_token(x) / np.float32(127)),
    ),
    "int8 per token, asymmetric": (
        INT8, grouped({}, **INT | {"symmetric": False}, strategy="token", dynamic=True), INT8_W, asymmetric,
    ),
    "int8 of the tensor": (
        INT8, grouped({}, **INT, strategy="tensor", dynamic=True), INT8_W,
        lambda x: on_int8(x, np.abs(x).max() / np.float32(127)),
    ),
    "int8 static": (
        INT8 | named(input_scale=STATIC), grouped({}, **INT, strategy="tensor", dynamic=False), INT8_W,
        lambda x: on_int8(x, STATIC),
    ),
    "int8 static, asymmetric": (
        INT8 | named(input_scale=STATIC.reshape(1), input_zero_point=np.int8([-11])),
        grouped({}, **INT | {"symmetric": False}, strategy="tensor", dynamic=False), INT8_W,
        lambda x: on_int8(x, STATIC, -11),
    ),
    "fp8 per token": (
        FLOAT8, grouped({}, **FLOAT, strategy="token", dynamic=True), FP8_W,
        lambda x: on_fp8(x, per_token(x) / np.float32(448)),
    ),
    "fp8 in groups": (
        FLOAT8, grouped({}, **FLOAT, strategy="group", group_size=32, dynamic=True), FP8_W, lambda x: in_groups(x, 32),
    ),
    "fp8 static": (
        FLOAT8 | named(input_scale=STATIC), grouped({}, **FLOAT, strategy="tensor", dynamic=False), FP8_W,
        lambda x: on_fp8(x, STATIC),
    ),
    "fp8, scheme static": (
        ONE | named(input_scale=STATIC), {"quant_method": "fp8", "activation_scheme": "static"}, ONE_W,
        lambda x: on_fp8(x, STATIC),
    ),
    "fp8, activation_scale": (
        ONE | named(activation_scale=STATIC), {"quant_method": "fp8", "activation_scheme": "static"}, ONE_W,
        lambda x: on_fp8(x, STATIC),
    ),
    "fp8, scheme dynamic": (
        ONE, {"quant_method": "fp8", "activation_scheme": "dynamic"}, ONE_W,
        lambda x: on_fp8(x, per_token(x) / np.float32(448)),
    ),
    "fp8 in blocks": (
        named(weight=SMALL, weight_scale_inv=BLOCKS),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [3, 32]}, BLOCK_W,
        lambda x: in_groups(x, 32),
    ),
    "fbgemm": (
        FLOAT8, {"quant_method": "fbgemm_fp8"}, FP8_W, lambda x: on_fp8(x, per_token(x) / np.float32(448)),
    ),
    "ModelOpt FP8": (
        ONE | named(input_scale=STATIC), {"quant_method": "modelopt", "quant_algo": "FP8"}, ONE_W,
        lambda x: on_fp8(x, STATIC),
    ),
    "ModelOpt per token": (
        FLOAT8, {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, FP8_W,
        lambda x: on_fp8(x, per_token(x) / np.float32(448)),
    ),
    "quanto int8": (
        {"m.weight._data": CODES, "m.weight._scale": SCALE} | named(input_scale=STATIC, output_scale=np.float32(1)),
        {"quant_method": "quanto", "weights": "int8", "activations": "qint8"}, INT8_W, lambda x: on_int8(x, STATIC),
    ),
    "LLM.int8()": (
        named(weight=CODES, SCB=SCALE[:, 0] * np.float32(127)),
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, INT8_W, without_outliers,
    ),
}  # fmt: skip


def directory(folder, tensors, config):
    return checkpoint(folder, tensors, {"torch_dtype": "float32", "quantization_config": config})


@pytest.mark.parametrize("name", SCHEMES)
def test_a_directory_runs_as_it_was_saved(name, tmp_path):
    tensors, config, w, rounded = SCHEMES[name]
    place = directory(tmp_path / "model", tensors, config)
    model = jq.io.load_model(place)
    assert set(model.params) == {"m.weight"}
    y = jax.jit(jq.quantized(product, model))(model.params, jnp.asarray(X))
    wanted, alone = rounded(X).astype(np.float64) @ w.T.astype(np.float64), X.astype(np.float64) @ w.T
    size = np.abs(X) @ np.abs(w.T)  # what a sum of such terms is rounded to
    # A quotient that lies within a rounding of a tie may go to the other side of it: a step for a few of the features.
    off = np.abs(y - wanted) / size
    assert off.max() < 4e-3
    assert np.median(off) < 1e-5
    assert np.abs(wanted - alone).max() > 50 * np.median(np.abs(y - wanted)), "the rounding of activations is seen"


@pytest.mark.parametrize("name", ["int8 per token", "fp8 static", "fp8 in blocks", "LLM.int8()"])
def test_weights_alone_are_warned_of(name, tmp_path):
    place = directory(tmp_path / "model", *SCHEMES[name][:2])
    with pytest.warns(UserWarning, match=r"load_hf: .* says how its activations are quantized.*Use load_model"):
        params, info = jq.io.load_hf(place)
    assert info.runs_otherwise
    model = jq.io.load_model(place, activations="float")
    assert model.plan is None
    assert model.state is None
    jax.tree.map(np.testing.assert_array_equal, model.params["m.weight"], params["m.weight"])


#: A part of the message -> tensors and configuration.
REFUSED = {
    "activation_scale_ub=1200.0": (FLOAT8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "activation_scheme='odd'": (ONE, {"quant_method": "fp8", "activation_scheme": "odd"}),
    "scale_fmt='ue8m0'": (ONE, {"quant_method": "fp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}),
    "the tensor is m.input_scale": (ONE, {"quant_method": "fp8", "activation_scheme": "static"}),
    "output_activations=": (INT8, grouped({}) | {"config_groups": {"g": {"targets": ["Linear"], "weights": INT,
                                                                        "output_activations": INT}}}),
    "input_activations=": (INT8, grouped({}, **INT, strategy="channel", dynamic=True)),
    "no scheme of its configuration uses": (INT8 | named(input_scale=STATIC), grouped({})),
    "quant_algo='W4A8'": (ONE, {"quant_method": "modelopt", "quant_algo": "W4A8"}),
    "output_scale=3.0": (
        {"m.weight._data": CODES, "m.weight._scale": SCALE} | named(input_scale=STATIC, output_scale=np.float32(3)),
        {"quant_method": "quanto", "weights": "int8", "activations": "qint8"},
    ),
    "scales for a cache of keys and values": (
        ONE | {"attn.k_scale": STATIC, "attn.v_scale": STATIC}, {"quant_method": "fp8"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_run_is_refused_by_its_key(message, tmp_path):
    place = directory(tmp_path / "model", *REFUSED[message])
    with pytest.raises(jq.QuantError, match=re.escape(message)):
        jq.io.load_model(place)
    model = jq.io.load_model(place, activations="float", cache="float")  # what every message offers
    assert set(model.params) == {"m.weight"}


# -- the plan ----------------------------------------------------------------------------------------------------------


def loaded(tmp_path, name="int8 static"):
    return jq.io.load_model(directory(tmp_path / "model", *SCHEMES[name][:2]))


def test_the_plan_of_a_function_is_one_to_print_and_to_save(tmp_path):
    model = loaded(tmp_path)
    plan = model.plan.plan_for(product, model.params, X)
    act = QuantSpec("int8", granularity="per_tensor", static=True, narrow_range=False)
    assert plan["m.weight"].spec == jq.OpSpec(weight=QuantSpec("int8"), act=act)
    assert "w int8, a int8 tensor static" in str(plan)
    jq.io.save(tmp_path / "native.safetensors", model.params, plan=plan, state=model.state)
    native = jq.io.load_model(tmp_path / "native.safetensors")
    y = jq.quantized(product, native)(native.params, X)
    np.testing.assert_array_equal(y, jq.quantized(product, model)(model.params, X))
    with pytest.raises(jq.QuantError, match=r"plan_for\(fn, params, \*args\)"):
        jq.io.save(tmp_path / "other.safetensors", model.params, plan=model.plan)
    with pytest.raises(jq.QuantError, match="not yet one of a function"):
        jq.calibrate(product, model.plan, model.params, [X])


def test_a_function_that_has_no_place_for_it_is_refused(tmp_path):
    model = loaded(tmp_path)
    with pytest.raises(jq.QuantError, match=r"no place for quantized activations: m.weight: .*mul"):
        jq.quantized(lambda p, x: p["m.weight"] * 2.0, model)(model.params, X)
    with pytest.raises(jq.QuantError, match=r"m.weight is no parameter \(nearest: 'n.weight'\)"):
        jq.quantized(lambda p, x: p["n.weight"], model)({"n.weight": X}, X)
    both = model.params | {"other": jnp.ones((3, IN))}
    y = jq.quantized(lambda p, x: x @ p["other"].T, model)(both, X)  # one that the function does not use is no error
    np.testing.assert_allclose(y, X @ np.ones((IN, 3), np.float32), rtol=1e-5, atol=1e-5)


def test_names_are_those_of_the_model(tmp_path):
    place = directory(tmp_path / "model", *SCHEMES["int8 static"][:2])
    names = jq.io.NameMap([(r"m\.weight", "dense/kernel", "transpose")])
    model = jq.io.load_model(place, names=names)
    y = jq.quantized(lambda p, x: x @ p["dense"]["kernel"], model)(model.params, X)
    _, _, w, rounded = SCHEMES["int8 static"]
    np.testing.assert_allclose(y, rounded(X) @ w.T, atol=1e-4 * np.abs(X).max() * np.abs(w).max())


def test_one_range_serves_the_layers_of_a_stack(tmp_path):
    """A scan over experts takes a range for each; where experts run as one product there is a place for one."""
    scales = np.float32([0.04, 0.02])
    codes = np.stack([CODES, CODES[::-1]])
    weight = codes.astype(np.float32).astype(FP8)
    parts = {"e": weight, "e_scale": np.ones((2, 1, 1), np.float32), "e_input_scale": scales}
    place = directory(tmp_path / "model", parts, {"quant_method": "fp8", "activation_scheme": "static"})
    model = jq.io.load_model(place)

    def scanned(p, x):
        return jax.lax.scan(lambda _, w: (None, x @ w.T), None, p["e"])[1]

    y = jq.quantized(scanned, model)(model.params, X)
    ws = weight.astype(np.float32)
    wanted = np.stack([on_fp8(X, s) @ w.T for s, w in zip(scales, ws, strict=True)])
    np.testing.assert_allclose(y, wanted, atol=1e-5 * np.abs(wanted).max())
    with pytest.raises(jq.QuantError, match="e has 2 ranges, and its use"):
        jq.quantized(lambda p, x: jnp.einsum("bi,eoi->ebo", x, p["e"]), model)(model.params, X)


def test_files_take_no_options_of_directories(tmp_path):
    jq.io.save(tmp_path / "a.safetensors", {"w": jnp.ones(3)})
    with pytest.raises(jq.QuantError, match="for directories of other libraries"):
        jq.io.load_model(tmp_path / "a.safetensors", dtype=jnp.float32)
    with pytest.raises(jq.QuantError, match="like is for files that save wrote"):
        jq.io.load_model(directory(tmp_path / "model", *SCHEMES["fbgemm"][:2]), like={})
    with pytest.raises(jq.QuantError, match="activations must be 'saved' or 'float'"):
        jq.io.load_model(tmp_path / "model", activations="int8")
