"""Directories that say how activations are quantized run as they were saved: against NumPy."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_files import checkpoint
from narrowed import present, untyped

import jaxquant as jq
from jaxquant.core.specs import QuantSpec
from jaxquant.transform.stated import StatedPlan

pytestmark = pytest.mark.every

FP8, FP4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
OUT, IN = 6, 64
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(5, IN)) * np.exp(RNG.normal(size=(5, 1)))).astype(np.float32)
X[4, :16] *= 1e-6  # a block of which the scale vanishes beside the others
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


def blocks_of(x, size, rounded):
    """Each block of so many features on its own."""
    return rounded(x.reshape(len(x), -1, size)).reshape(x.shape)


def powers_of_two(x):
    """DeepSeek V3.1: scales rounded up to powers of two."""
    return on_fp8(x, np.exp2(np.ceil(np.log2(per_token(x) / np.float32(448)))).astype(np.float32))


def on_mx(x, dtype, greatest, up=0.0):
    """OCP MX; compressed-tensors takes the next power of two from 1.75 times one on: ``up=0.25``."""
    mantissa, exponent = np.frexp(per_token(x))  # mantissa * 2 of [1, 2)
    exponent = exponent - 1 + (2 * mantissa + up >= 2) - int(np.log2(greatest))
    scale = np.exp2(exponent).astype(np.float32)
    return np.clip(x / scale, -greatest, greatest).astype(dtype).astype(np.float32) * scale


def on_nvfp4(x, unit):
    """fp8 scales of blocks in units of one float; a block whose scale rounds to 0 becomes 0."""
    local = np.minimum(per_token(x) / np.float32(6) / unit, 448).astype(FP8).astype(np.float32)
    scale = np.where(local == 0, np.float32(1), local) * unit
    return np.where(local == 0, 0, np.clip(x / scale, -6, 6).astype(FP4).astype(np.float32) * scale)


def fbgemm(x, most=np.inf):
    return on_fp8(x, np.clip(per_token(x), 1 / 512, most).astype(np.float32) / np.float32(448))


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
MINUS_11 = np.array([-11], np.int8)
INT8_W, FP8_W = CODES * SCALE, SMALL.astype(np.float32) * SCALE
ONE_W = SMALL.astype(np.float32) * np.float32(0.3)
BLOCKS = np.exp(RNG.normal(size=(2, 2))).astype(np.float32)
BLOCK_W = SMALL.astype(np.float32) * np.repeat(np.repeat(BLOCKS, 3, 0), 32, 1)
INT = {"num_bits": 8, "type": "int", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}

EXPONENTS = RNG.integers(124, 130, (OUT, 2)).astype(np.uint8)
MX8 = named(weight=SMALL, weight_scale=EXPONENTS)
MX8_W = SMALL.astype(np.float32) * np.repeat(np.exp2(EXPONENTS - 127.0), 32, 1).astype(np.float32)
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NIBBLES = RNG.integers(0, 16, (OUT, IN)).astype(np.uint8)
NV = NIBBLES[:, ::2] | NIBBLES[:, 1::2] << 4
NV_SCALES = np.exp(RNG.normal(size=(OUT, 4))).astype(FP8)
NV_W = GRID[NIBBLES] * np.repeat(NV_SCALES.astype(np.float32), 16, 1)
UNIT = np.float32(0.0019)
TERNARY = RNG.integers(0, 3, (4, 2, IN)).astype(np.uint8)

#: Name -> (tensors, quantization configuration, the weight, what the activations become).
SCHEMES = {
    "int8 per token": (
        INT8, grouped({}, **INT, strategy="token", dynamic=True), INT8_W,
        lambda x: on_int8(x, per_token(x) / np.float32(127.5)),
    ),
    "int8 in groups": (
        INT8, grouped({}, **INT, strategy="group", group_size=16, dynamic=True), INT8_W,
        lambda x: blocks_of(x, 16, lambda x: on_int8(x, per_token(x) / np.float32(127.5))),
    ),
    "int8 per token, asymmetric": (
        INT8, grouped({}, **INT | {"symmetric": False}, strategy="token", dynamic=True), INT8_W, asymmetric,
    ),
    "int8 of the tensor": (
        INT8, grouped({}, **INT, strategy="tensor", dynamic=True), INT8_W,
        lambda x: on_int8(x, np.abs(x).max() / np.float32(127.5)),
    ),
    "int8 static": (
        INT8 | named(input_scale=STATIC), grouped({}, **INT, strategy="tensor", dynamic=False), INT8_W,
        lambda x: on_int8(x, STATIC),
    ),
    "int8 static, asymmetric": (
        INT8 | named(input_scale=STATIC.reshape(1), input_zero_point=MINUS_11),
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
    "fp8 in blocks, ue8m0": (
        named(weight=SMALL, weight_scale_inv=BLOCKS),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [3, 32], "scale_fmt": "ue8m0"},
        BLOCK_W, lambda x: blocks_of(x, 32, powers_of_two),
    ),
    "fbgemm": (FLOAT8, {"quant_method": "fbgemm_fp8"}, FP8_W, fbgemm),
    "fbgemm, bounded": (
        FLOAT8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1.5}, FP8_W, lambda x: fbgemm(x, 1.5),
    ),
    "mxfp8": (
        MX8, {"quant_method": "mxfp8", "activation_scheme": "dynamic"}, MX8_W,
        lambda x: blocks_of(x, 32, lambda x: on_mx(x, FP8, 448)),
    ),
    "ModelOpt MXFP8": (
        MX8, {"quant_method": "modelopt", "quant_algo": "MXFP8"}, MX8_W,
        lambda x: blocks_of(x, 32, lambda x: on_mx(x, FP8, 448)),
    ),
    "compressed-tensors mxfp8": (
        MX8, grouped({}, **FLOAT, strategy="group", group_size=32, dynamic=True, scale_dtype="torch.uint8"), MX8_W,
        lambda x: blocks_of(x, 32, lambda x: on_mx(x, FP8, 448, 0.25)),
    ),
    "compressed-tensors mxfp4": (
        MX8, grouped({}, **FLOAT | {"num_bits": 4}, strategy="group", group_size=32, dynamic=True,
                     scale_dtype="torch.uint8"), MX8_W,
        lambda x: blocks_of(x, 32, lambda x: on_mx(x, FP4, 6, 0.25)),
    ),
    "compressed-tensors nvfp4": (
        named(weight_packed=NV, weight_scale=NV_SCALES, weight_global_scale=np.array([4], np.float32),
              input_global_scale=np.array([1 / UNIT], np.float32)),
        grouped({}, **FLOAT | {"num_bits": 4}, strategy="tensor_group", group_size=16, dynamic="local",
                scale_dtype="torch.float8_e4m3fn"), NV_W / 4,
        lambda x: blocks_of(x, 16, lambda x: on_nvfp4(x, UNIT)),
    ),
    "ModelOpt NVFP4": (
        named(weight=NV, weight_scale=NV_SCALES, weight_scale_2=np.float32(0.5), input_scale=UNIT),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, NV_W / 2,
        lambda x: blocks_of(x, 16, lambda x: on_nvfp4(x, UNIT)),
    ),
    "BitNet": (
        named(weight=TERNARY[0] + 4 * TERNARY[1] + 16 * TERNARY[2] + 64 * TERNARY[3],
              weight_scale=np.array([2], np.float32)),
        {"quant_method": "bitnet"}, (TERNARY.reshape(8, IN).astype(np.float32) - 1) / 2,
        lambda x: on_int8(x, per_token(x) / np.float32(127)),
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
    assert_runs(directory(tmp_path / "model", tensors, config), rounded, w)


def assert_runs(place, rounded, w, **how):
    model = jq.io.load_model(place, **how)
    assert set(model.params) == {"m.weight"}
    y = jax.jit(jq.quantized(product, model))(model.params, jnp.asarray(X))
    wanted, alone = rounded(X).astype(np.float64) @ w.T.astype(np.float64), X.astype(np.float64) @ w.T
    size = np.abs(X) @ np.abs(w.T)  # what a sum of such terms is rounded to
    # A quotient that lies within a rounding of a tie may go to the other side of it: a step for a few of the features.
    off = np.abs(y - wanted) / size
    assert off.max() < 4e-3
    assert np.median(off) < 1e-5
    assert np.abs(wanted - alone).max() > 50 * np.median(np.abs(y - wanted)), "the rounding of activations is seen"


def torchao(folder, kind, parts, **data):
    """A weight of torchao as its safetensors support writes it."""
    entry = {"_type": kind, "_data": {"dtype": {"_type": "torch.dtype", "_data": "float32"}, **data}}
    tensors = {f"m._weight_{name}": value for name, value in parts.items()}
    config = {"torch_dtype": "float32", "quantization_config": {"quant_method": "torchao"}}
    return checkpoint(folder, tensors, config, metadata={"m.weight": json.dumps(entry)})


def kwargs(kind, granularity="PerRow", **data):
    return {"_type": f"QuantizeTensorTo{kind}Kwargs", "_data": {"granularity": {"_type": granularity}, **data}}


AS_INT8 = {"qdata": CODES, "scale": SCALE}
AS_FLOAT8 = {"qdata": SMALL, "scale": SCALE}
INT4 = (CODES.astype(np.int32) % 16 - 8).astype(np.int8)
GROUPS = np.exp(RNG.normal(size=(OUT, 2))).astype(np.float32)
ASYMMETRIC: dict[str, Any] = {"mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"}}

#: Name -> (type, tensors, metadata, the weight, what the activations become).
OF_TORCHAO = {
    "int8, int8 per token": (
        "Int8Tensor", AS_INT8, {"act_quant_kwargs": kwargs("Int8")}, INT8_W,
        lambda x: on_int8(x, per_token(x) / np.float32(127.5)),
    ),
    "int8, int8 of the tensor": (
        "Int8Tensor", AS_INT8, {"act_quant_kwargs": kwargs("Int8", "PerTensor")}, INT8_W,
        lambda x: on_int8(x, np.abs(x).max() / np.float32(127.5)),
    ),
    "int8, 7 bits": (
        "Int8Tensor", AS_INT8, {"act_quant_kwargs": kwargs("Int8", reduce_range=True)}, INT8_W,
        lambda x: np.clip(np.rint(x / (s := per_token(x) / np.float32(63.5))), -64, 63) * s,
    ),
    "int8, asymmetric": (
        "Int8Tensor", AS_INT8, {"act_quant_kwargs": kwargs("Int8", **ASYMMETRIC)}, INT8_W, asymmetric,
    ),
    "int8, static": (
        "Int8Tensor",
        AS_INT8 | {"act_quant_scale": STATIC.reshape(1, 1), "act_quant_zero_point": MINUS_11.reshape(1, 1)},
        {"act_quant_kwargs": kwargs("Int8", "PerTensor", **ASYMMETRIC)}, INT8_W, lambda x: on_int8(x, STATIC, -11),
    ),
    "int4 in groups, int8 per token": (
        "IntxUnpackedToInt8Tensor", {"qdata": INT4, "scale": GROUPS, "zero_point": np.zeros((OUT, 2), np.int8)},
        {"block_size": [1, 32], "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
         "activation_quantization": "int8_asym_per_token"}, INT4 * np.repeat(GROUPS, 32, 1), asymmetric,
    ),
    "fp8 per token": (
        "Float8Tensor", AS_FLOAT8, {"act_quant_kwargs": kwargs("Float8")}, FP8_W,
        lambda x: on_fp8(x, per_token(x) / np.float32(448)),
    ),
    "fp8, bounded": (
        "Float8Tensor", AS_FLOAT8, {"act_quant_kwargs": kwargs("Float8", hp_value_lb=1.0, hp_value_ub=1.5)}, FP8_W,
        lambda x: on_fp8(x, np.clip(per_token(x), 1, 1.5).astype(np.float32) / np.float32(448)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_TORCHAO)
def test_a_directory_of_torchao_runs_as_it_was_saved(name, tmp_path):
    kind, parts, data, w, rounded = OF_TORCHAO[name]
    assert_runs(torchao(tmp_path / "model", kind, parts, **data), rounded, w)


def test_scales_of_features_are_refused(tmp_path):
    parts = AS_INT8 | {"act_pre_scale": np.ones(IN, np.float32)}
    place = torchao(tmp_path / "model", "Int8Tensor", parts, act_quant_kwargs=kwargs("Int8"))
    with pytest.raises(jq.QuantError, match="act_pre_scale': its input is multiplied by a scale for each"):
        jq.io.load_model(place)


def test_inputs_are_rounded_where_outputs_cannot_be(tmp_path):
    tensors = {"m.weight._data": CODES, "m.weight._scale": SCALE}
    tensors |= named(input_scale=STATIC, output_scale=np.float32(0.3))
    place = directory(
        tmp_path / "quanto", tensors, {"quant_method": "quanto", "weights": "int8", "activations": "qint8"}
    )
    with pytest.raises(jq.QuantError, match="Round the inputs alone: activations='inputs'"):
        jq.io.load_model(place)
    assert_runs(place, lambda x: on_int8(x, STATIC), INT8_W, activations="inputs")
    stated = {
        "targets": ["Linear"],
        "weights": INT,
        "output_activations": INT,
        "input_activations": INT | {"strategy": "token", "dynamic": True},
    }
    config = grouped({}) | {"config_groups": {"g": stated}}
    place = directory(tmp_path / "compressed", INT8 | named(output_scale=np.float32(0.3)), config)
    with pytest.raises(jq.QuantError, match="outputs are rounded, too"):
        jq.io.load_model(place)
    assert_runs(place, lambda x: on_int8(x, per_token(x) / np.float32(127.5)), INT8_W, activations="inputs")


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
    "activation_scale_ub=0.0": (FLOAT8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 0.0}),
    "the tensor is m.input_global_scale": (
        named(weight_packed=NV, weight_scale=NV_SCALES, weight_global_scale=np.array([4], np.float32)),
        grouped({}, **FLOAT | {"num_bits": 4}, strategy="tensor_group", group_size=16, dynamic="local"),
    ),
    "activation_scheme='odd'": (ONE, {"quant_method": "fp8", "activation_scheme": "odd"}),
    "scale_fmt='odd'": (ONE, {"quant_method": "fp8", "activation_scheme": "dynamic", "scale_fmt": "odd"}),
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
    "does not say of which type they are": (
        {"m.weight._data": CODES, "m.weight._scale": SCALE} | named(input_scale=STATIC, output_scale=np.float32(1)),
        {"quant_method": "quanto", "weights": "int8"},
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
    assert isinstance(model.plan, StatedPlan)
    plan = model.plan.plan_for(product, model.params, X)
    act = QuantSpec("int8", granularity="per_tensor", static=True, narrow_range=False)
    assert plan["m.weight"].spec == jq.OpSpec(weight=QuantSpec("int8"), act=act)
    assert "w int8, a int8 tensor static" in str(plan)
    jq.io.save(tmp_path / "native.safetensors", model.params, plan=plan, state=model.state)
    native = jq.io.load_model(tmp_path / "native.safetensors")
    y = jq.quantized(product, native)(native.params, X)
    np.testing.assert_array_equal(y, jq.quantized(product, model)(model.params, X))
    with pytest.raises(jq.QuantError, match=r"plan_for\(fn, params, \*args\)"):
        untyped.io.save(tmp_path / "other.safetensors", model.params, plan=model.plan)
    with pytest.raises(jq.QuantError, match="not yet one of a function"):
        untyped.calibrate(product, model.plan, model.params, [X])


@pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn"])
def test_what_we_save_runs_as_it_ran(qtype, tmp_path):
    """Bit for bit, and the library of the format reads the file."""
    spec = QuantSpec(qtype)
    params = {"m.weight": jq.quantize(jnp.asarray(INT8_W), spec, reduce_axes=(-1,))}
    plan = jq.make_plan(product, params, X, rules=[jq.Rule("m", jq.OpSpec(weight=spec, act=spec))])
    jq.io.save_hf(tmp_path / "model", params, act=spec)
    model = jq.io.load_model(tmp_path / "model")
    assert isinstance(model.plan, StatedPlan)
    assert model.plan.specs["m.weight"].act == spec
    y = jax.jit(jq.quantized(product, model))(model.params, jnp.asarray(X))
    np.testing.assert_array_equal(y, jax.jit(jq.quantized(product, plan))(params, jnp.asarray(X)))
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationConfig

    stated = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    theirs: Any = QuantizationConfig.model_validate(stated).config_groups["group_0"]
    act = theirs.input_activations
    assert (act.num_bits, act.dynamic, act.strategy) == (8, True, "token")


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
    scales = np.array([0.04, 0.02], np.float32)
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
    with pytest.raises(jq.QuantError, match="activations must be 'saved' or 'inputs' or 'float'"):
        untyped.io.load_model(tmp_path / "model", activations="int8")


# -- against the library itself, where it is installed -----------------------------------------------------------------

#: Arguments of compressed-tensors' QuantizationArgs.
OF_THE_LIBRARY = {
    "token": INT | {"strategy": "token", "dynamic": True},
    "tensor": INT | {"strategy": "tensor", "dynamic": True},
    "group": INT | {"strategy": "group", "group_size": 16, "dynamic": True},
    "int4": INT | {"num_bits": 4, "strategy": "token", "dynamic": True},
    "asymmetric": INT | {"symmetric": False, "strategy": "token", "dynamic": True},
    "fp8": FLOAT | {"strategy": "token", "dynamic": True},
    "mxfp8": FLOAT | {"strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
    "mxfp4": FLOAT
    | {"num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
    "nvfp4": FLOAT
    | {
        "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_values_are_those_of_compressed_tensors(name, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = np.concatenate([X, RNG.normal(size=(20, IN)).astype(np.float32)])
    x[6, 0] = 1.75 * 2**6  # from which on scales of MX are rounded up
    args, unit = OF_THE_LIBRARY[name], torch.tensor([500.0]) if name == "nvfp4" else None
    value, how = torch.from_numpy(x)[None], QuantizationArgs(**args)
    module: Any = None  # of no use for these strategies
    scale, zero = compute_dynamic_scales_and_zp(value, how, module, unit)
    wanted = fake_quantize(value, scale, zero, how, global_scale=unit).numpy()[0]
    tensors = INT8 | (named(input_global_scale=np.array([500.0], np.float32)) if unit is not None else {})
    model = jq.io.load_model(directory(tmp_path / "model", tensors, grouped({}, **args)))
    assert isinstance(model.plan, StatedPlan)
    spec, state = present(model.plan.specs["m.weight"].act), model.state
    scale = jnp.asarray(state["m.weight"]["scale"]) if state else None
    found = jq.fake_quant(x, spec, reduce_axes=(-1,), scale=scale)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["qint8", "qfloat8"])
def test_values_are_those_of_quanto(kind, tmp_path):
    """Of a model that the library has calibrated: by default it rounds no output that an operation takes as float."""
    torch = pytest.importorskip("torch")
    quanto = pytest.importorskip("optimum.quanto", exc_type=ImportError)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(IN, 48), torch.nn.SiLU(), torch.nn.Linear(48, OUT))
    quanto.quantize(model, weights=quanto.qint8, activations=getattr(quanto, kind))
    with torch.no_grad(), quanto.Calibration():
        model(torch.from_numpy(X))
    quanto.freeze(model)
    with torch.no_grad():
        wanted = model(torch.from_numpy(X)).numpy()
    tensors = {name: value.float() if "scale" in name else value for name, value in model.state_dict().items()}
    arrays = {name: value.detach().numpy() for name, value in tensors.items()}
    place = checkpoint(tmp_path / "model", arrays, {"torch_dtype": "float32"})
    (place / "quanto_qmap.json").write_text(json.dumps(quanto.quantization_map(model)))
    assert all(float(tensors[f"{i}.output_scale"]) != 1 for i in (0, 2))
    loaded = jq.io.load_model(place, activations="inputs")

    def ours(p, x):
        x = x @ p["0.weight"].T + p["0.bias"][None]
        return jax.nn.silu(x) @ p["2.weight"].T + p["2.bias"][None]

    found = jq.quantized(ours, loaded)(loaded.params, X)
    off = np.abs(found - wanted)
    assert np.median(off) < 1e-5 * np.abs(wanted).max()  # a quotient near a tie may go to the other side of it
    assert off.max() < 5e-3 * np.abs(wanted).max()
