"""What a configuration states of each module, against values computed from the integers that went into the file."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hf_cases import CASES
from hf_files import checkpoint, values

import jaxquant as jq
from jaxquant.io.hf.to_qtensor import block_size, spread

# Weights are what is read here, also of files that say how activations are quantized.
pytestmark = pytest.mark.filterwarnings("ignore:.*gives its weights alone")

E4M3 = ml_dtypes.float8_e4m3fn


def stream(codes, bits):
    """A little-endian bit stream along the last axis, in words."""
    planes = (codes[..., None] >> np.arange(bits)) & 1
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] * bits // 32) * 32), np.uint8)
    padded[..., : codes.shape[-1] * bits] = planes.reshape(*codes.shape[:-1], -1)
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


def gptq(name, bits, group, columns, out=32, *, seed=0, order=None):
    """A symmetric module as a file holds it, and its weight; ``order`` is the group of each column."""
    rng = np.random.default_rng(seed)
    codes, groups = rng.integers(0, 1 << bits, (out, columns)), -(-columns // group)
    scales, half = rng.uniform(0.1, 1, (groups, out)).astype(np.float16), 1 << (bits - 1)
    index = np.arange(columns) // group if order is None else order
    parts = {
        f"{name}.qweight": np.ascontiguousarray(stream(codes, bits).T).view(np.int32),
        f"{name}.qzeros": stream(np.full((groups, out), half - 1), bits).view(np.int32),
        f"{name}.scales": scales,
    }
    return parts, ((codes - half) * scales.T.astype(np.float32)[:, index]).astype(np.float16)


def load(folder, tensors, method, **config):
    return jq.io.load_hf(checkpoint(folder, tensors, {"quantization_config": {"quant_method": method, **config}}))


# -- widths and group sizes -------------------------------------------------------------------------------------------

MIXED = {"a.0.up": (4, 128, 192), "a.0.down": (8, 64, 192), "a.1.up": (2, 32, 192), "a.1.down": (4, 96, 192)}


@pytest.mark.parametrize("kind", ["dynamic", "extra_config", "in a file of its own"])
def test_modules_differ(tmp_path, kind):
    tensors, weights = {"a.0.gate.weight": np.ones((4, 64), np.float32)}, {}
    for seed, (name, (bits, group, columns)) in enumerate(MIXED.items()):
        parts, weights[name] = gptq(name, bits, group, columns, seed=seed)
        tensors |= parts
    base = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    dynamic = {
        "-:.*gate": {},
        r"+:a\.0\.down$": {"bits": 8, "group_size": 64},
        r"a\.1\.up": {"bits": 2, "group_size": 32},
        "+:.*1.down": {"group_size": 96},
        r"+:a\.0\.down": {"bits": 2, "group_size": 16},  # the first that matches counts
    }
    extra = {
        "a.0.down": {"bits": 8, "group_size": 64},
        "0.down": {"bits": 2, "group_size": 16},  # the module's own name counts before an expression
        r"a\.1\.up": {"bits": 2, "group_size": 32},
        "1.down$": {"group_size": 96},
        "a.0.gate": {"bits": 16},
    }
    if kind == "dynamic":
        params, info = load(tmp_path, tensors, "gptq", **base, dynamic=dynamic)
    elif kind == "extra_config":
        packing = "auto_round:auto_gptq"
        params, info = load(tmp_path, tensors, "auto-round", **base, extra_config=extra, packing_format=packing)
    else:
        files = [("quantize_config.json", base | {"dynamic": dynamic})]
        params, info = jq.io.load_hf(checkpoint(tmp_path, tensors, files=files))
    assert info.problems == ()
    for name, weight in weights.items():
        np.testing.assert_array_equal(values(params[f"{name}.weight"], np.float16), np.where(weight == 0, 0, weight))


@pytest.mark.parametrize("columns, group, base", [(192, 96, None), (480, 128, 64), (480, 128, None), (448, 128, 32)])
def test_an_ambiguous_size_is_refused(tmp_path, columns, group, base):
    """192 columns in two groups are twice 96, or 128 and 64; 480 in four are four times 120, or three times 128."""
    tensors, weight = gptq("m", 4, group, columns)
    with pytest.raises(jq.QuantError, match=r"m.scales': the group size is not stated, or does not fit the shapes"):
        load(tmp_path / "a", tensors, "gptq", bits=4, group_size=base, sym=True)
    params, _ = load(
        tmp_path / "b", tensors, "gptq", bits=4, group_size=base, sym=True, dynamic={"m": {"group_size": group}}
    )
    np.testing.assert_array_equal(values(params["m.weight"], np.float16), np.where(weight == 0, 0, weight))


def test_a_size_that_the_shapes_leave_no_doubt_of(tmp_path):
    tensors, weight = gptq("m", 4, 64, 256)
    for base, said in ((None, "groups of 64, by its shapes"), (128, "")):
        params, info = load(tmp_path / str(base), tensors, "gptq", bits=4, group_size=base, sym=True)
        np.testing.assert_array_equal(values(params["m.weight"], np.float16), np.where(weight == 0, 0, weight))
        assert said in info.modules["m.weight"]
    assert info.problems == ("m.weight has groups of 64 by its shapes, though the configuration says 128",)


def test_a_module_left_in_float_that_has_codes(tmp_path):
    tensors, _ = gptq("m", 4, 64, 256)
    for i, entry in enumerate(({"dynamic": {"-:m": {}}}, {"extra_config": {"m": {"bits": 16}}})):
        _, info = load(tmp_path / str(i), tensors, "gptq", bits=4, group_size=64, **entry)
        assert info.problems == ("m.weight has codes, though the configuration leaves it in float",)


@pytest.mark.parametrize("entry", [{"dynamic": {"+:(": {}}}, {"extra_config": {"*": {"bits": 8}}}])
def test_patterns_that_are_none(tmp_path, entry):
    tensors, _ = gptq("m", 4, 64, 256)
    with pytest.raises(jq.QuantError, match="a pattern of the configuration is not a regular expression"):
        load(tmp_path / "a", tensors, "gptq", bits=4, group_size=64, **entry)
    (key,) = entry
    with pytest.raises(jq.QuantError, match=f"{key} must be an object of objects"):
        load(tmp_path / "b", tensors, "gptq", bits=4, group_size=64, **{key: ["m"]})


def test_act_order_needs_its_groups(tmp_path):
    order = np.random.default_rng(1).permutation(np.arange(256) // 64)
    tensors, weight = gptq("m", 4, 64, 256, order=order)
    with pytest.raises(jq.QuantError, match="the configuration states act-order, but g_idx, which"):
        load(tmp_path / "a", tensors, "gptq", bits=4, group_size=64, sym=True, desc_act=True)
    tensors["m.g_idx"] = order.astype(np.int32)
    params, _ = load(tmp_path / "b", tensors, "gptq", bits=4, group_size=64, sym=True, desc_act=True)
    np.testing.assert_array_equal(values(params["m.weight"], np.float16), np.where(weight == 0, 0, weight))
    for bad in (-1, 4):
        tensors["m.g_idx"] = np.where(np.arange(256) == 7, bad, order).astype(np.int32)
        with pytest.raises(jq.QuantError, match="g_idx names a group that has no scales"):
            load(tmp_path / str(bad), tensors, "gptq", bits=4, group_size=64, sym=True, desc_act=True)


def test_indices_that_were_never_filled_in(tmp_path):
    """Zeros throughout say nothing: with several groups they are consecutive."""
    tensors, weight = gptq("m", 4, 64, 256)
    tensors["m.g_idx"] = np.zeros(256, np.int32)
    params, info = load(tmp_path, tensors, "gptq", bits=4, group_size=64, sym=True)
    np.testing.assert_array_equal(values(params["m.weight"], np.float16), np.where(weight == 0, 0, weight))
    assert "g_idx is 0 throughout" in info.modules["m.weight"]


def test_awq_states_its_size_too(tmp_path):
    tensors, config, *_ = CASES["awq gemm"]
    right = jq.io.load_hf(checkpoint(tmp_path / "a", tensors, config))[0]["m.weight"].dequantize()
    own = config["quantization_config"] | {"group_size": 32, "extra_config": {"m": {"group_size": 64}}}
    found = load(tmp_path / "b", tensors, **{"method": own.pop("quant_method"), **own})[0]["m.weight"]
    np.testing.assert_array_equal(found.dequantize(), right)
    with pytest.raises(jq.QuantError, match="AWQ has 4-bit codes only; got bits=8"):
        load(tmp_path / "c", tensors, "awq", bits=4, group_size=64, dynamic={"m": {"bits": 8}})
    gemv, config, *_ = CASES["awq gemv"]
    with pytest.raises(jq.QuantError, match="the group size is not stated"):
        load(tmp_path / "d", gemv, "awq", bits=4, version="gemv")


def test_blocks_by_shapes():
    """One size, if it is equal parts and no power of two gives as many blocks."""
    assert [block_size(192, n) for n in (1, 2, 3, 192)] == [192, None, 64, 1]
    assert [block_size(480, n) for n in (2, 3, 4, 15)] == [None, 160, None, 32]
    assert block_size(80, 3) is block_size(4, 0) is None
    scale = np.ones((2, 3), np.float32)
    assert spread(scale, (64, 192), (None, None)) is not None
    assert spread(scale, (64, 192), (32, 96)) is None
    assert spread(scale.T, (192, 64), (None, None)) is not None
    assert spread(np.ones((2, 1)), (192, 64), (None, None)) is None


def ct(folder, tensors, groups, form="pack-quantized"):
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    return jq.io.load_hf(checkpoint(folder, tensors, {"dtype": "bfloat16", "quantization_config": config}))


def test_config_groups(tmp_path):
    """A name counts before an expression, and that before a class; 12 words of 8-bit codes hold as many of 4 bits."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (8, 192)), rng.random((8, 2)).astype(np.float32)
    parts = {
        "a.up.weight_packed": stream(codes, 4).view(np.int32),
        "a.up.weight_scale": scale,
        "a.up.weight_shape": np.array([8, 192], np.int64),
    }
    weights = lambda size, bits=4: {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size}  # noqa: E731
    groups = {
        "class": {"targets": ["Linear"], "weights": weights(96)},
        "expression": {"targets": ["re:.*up$"], "weights": weights(128)},
    }
    wide = lambda size: np.repeat(scale, size, 1)[:, :192]  # noqa: E731
    params, _ = ct(tmp_path / "a", parts, groups)
    np.testing.assert_array_equal(params["a.up.weight"].dequantize(), (codes - 8.0).astype(np.float32) * wide(128))
    params, _ = ct(tmp_path / "b", parts, groups | {"name": {"targets": ["a.up"], "weights": weights(96)}})
    np.testing.assert_array_equal(params["a.up.weight"].dequantize(), (codes - 8.0).astype(np.float32) * wide(96))
    both = {"one": groups["class"], "other": {"targets": ["Linear"], "weights": weights(128)}}
    with pytest.raises(jq.QuantError, match=r"a.up.weight_scale': one value per tensor, row, group or block"):
        ct(tmp_path / "c", parts, both)
    with pytest.raises(jq.QuantError, match=r"a.up.weight_scale': one value per tensor, row, group or block"):
        ct(tmp_path / "d", parts, {"one": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}})
    with pytest.raises(jq.QuantError, match=r"no configured width fits weight_packed"):
        ct(tmp_path / "e", parts, {"one": {"targets": ["re:a"], "weights": weights(96, 8)}, "two": groups["class"]})
    with pytest.raises(jq.QuantError, match="a pattern of the configuration is not a regular expression"):
        ct(tmp_path / "f", parts, {"one": {"targets": ["re:("], "weights": weights(96)}})
    zero = parts | {"a.up.weight_zero_point": np.full((8, 2), 8, np.int8)}
    with pytest.raises(jq.QuantError, match=r"a zero point is not a code of the type; got least=8"):
        ct(tmp_path / "g", zero, groups)


def test_fp8_blocks(tmp_path):
    """Two block rows of 192: 128 and 64 if the configuration says so, and refused if it says nothing."""
    rng = np.random.default_rng(0)
    weight, scale = rng.normal(size=(192, 64)).astype(E4M3), rng.random((2, 1)).astype(np.float32)
    parts = {"m.weight": weight, "m.weight_scale_inv": scale}
    params, _ = load(tmp_path / "a", parts, "fp8", weight_block_size=[128, 128])
    wanted = weight.astype(np.float32) * np.repeat(scale, 128, 0)[:192]
    np.testing.assert_array_equal(params["m.weight"].dequantize(np.float32), wanted)
    with pytest.raises(jq.QuantError, match="the scales fit no blocks of the weight"):
        load(tmp_path / "b", parts, "fp8")
    parts["m.weight_scale_inv"] = rng.random((3, 1)).astype(np.float32)
    _, info = load(tmp_path / "c", parts, "fp8", weight_block_size=[128, 128])
    assert "weight_block_size=[128, 128]" in info.problems[0]
    for blocks in ([0, 128], [-128, 128], [128], [1, 128, 128], [128.0, 128.0], [True, True], 128, "128", [], {}):
        with pytest.raises(jq.QuantError, match="weight_block_size must be the rows and the columns of a block"):
            load(tmp_path / "d", parts, "fp8", weight_block_size=blocks)


def test_modelopt_layers(tmp_path):
    rng = np.random.default_rng(0)
    weight, scale = rng.normal(size=(192, 64)).astype(E4M3), rng.random((2, 1)).astype(np.float32)
    parts = {"m.weight": weight, "m.weight_scale": scale}

    def read(name, algorithm):
        layers = {"m": {"quant_algo": algorithm}}
        said = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
        return jq.io.load_hf(checkpoint(tmp_path / name, parts, files=[("hf_quant_config.json", said)]))

    params, info = read("a", "FP8_PB_WO")
    wanted = weight.astype(np.float32) * np.repeat(scale, 128, 0)[:192]
    np.testing.assert_array_equal(params["m.weight"].dequantize(np.float32), wanted)
    assert not info.problems
    with pytest.raises(jq.QuantError, match="the scales fit no blocks of the weight"):
        read("b", "FP8")
    with pytest.raises(jq.QuantError, match=r"scaled by pre_quant_scale.*got quant_algo='W4A8_AWQ'"):
        read("c", "W4A8_AWQ")
    parts["m.weight_scale"] = np.ones(1, np.float32)
    assert "m.weight has codes in float8_e4m3fn, though the configuration says NVFP4" in read("d", "NVFP4")[1].problems


def test_quanto_widths(tmp_path):
    """Two rows in one byte: int4, or int2 with half of the byte unused."""
    rng = np.random.default_rng(0)
    parts = {
        "m.weight._data._data": rng.integers(0, 16, (1, 16)).astype(np.uint8),
        "m.weight._scale": np.ones((2, 1), np.float16),
        "m.weight._shift": np.zeros((2, 1), np.float16),
    }
    with pytest.raises(jq.QuantError, match=r"int4 and int2 both fit the shapes.*quanto_qmap.json"):
        load(tmp_path / "a", parts, "quanto")
    for said, mask, shift in (("int4", 15, 4), ("int2", 3, 2)):
        params, _ = load(tmp_path / said, parts, "quanto", weights=said)
        raw = parts["m.weight._data._data"]
        wanted = np.concatenate([raw & mask, raw >> shift & mask])
        np.testing.assert_array_equal(params["m.weight"].dequantize(), wanted)
        files = [("quanto_qmap.json", {"m": {"weights": f"q{said}", "activations": "none"}})]
        params, _ = jq.io.load_hf(checkpoint(tmp_path / f"q{said}", parts, files=files))
        np.testing.assert_array_equal(params["m.weight"].dequantize(), wanted)


@pytest.mark.parametrize("place", ["quant_config", "dynamic_config"])
def test_hqq_parameters_by_tag(tmp_path, place):
    """Where the file has no parameters of a module, the configuration has them, for all or by the end of its name."""
    tensors, _, *_ = CASES["hqq"]
    known = {n.removeprefix("m."): a for n, a in tensors.items()}
    right = jq.io.load_hf(checkpoint(tmp_path / "a", tensors, CASES["hqq"][1]))[0]["m.weight"]
    names = ("nbits", "axis", "group_size")
    own = {name: int(known.pop(name)) for name in names}
    parts = {f"model.layers.3.mlp.up.{n}": a for n, a in known.items()}
    config = {place: {"mlp.up": {"weight_quant_params": own}, "mlp.down": {"weight_quant_params": {"nbits": 8}}}}
    found = load(tmp_path / "b", parts, "hqq", **config)[0]["model.layers.3.mlp.up.weight"]
    np.testing.assert_array_equal(found.dequantize(), right.dequantize())


def test_torchao_blocks(tmp_path):
    """The header says how large a block is: 192 columns of two scales are 96 and 96."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-8, 8, (4, 192)).astype(np.int8), rng.random((4, 2)).astype(np.float32)
    dtype = lambda name: {"_type": "torch.dtype", "_data": name}  # noqa: E731

    def read(folder, zero=0, **data):
        entry = {"_type": "IntxUnpackedToInt8Tensor", "_data": {"dtype": dtype("float32"), **data}}
        parts = {"m._weight_qdata": codes, "m._weight_scale": scale}
        parts["m._weight_zero_point"] = np.full((4, 2), zero, np.int8)
        config = {"quantization_config": {"quant_method": "torchao"}}
        return jq.io.load_hf(checkpoint(folder, parts, config, metadata={"m.weight": json.dumps(entry)}))[0]["m.weight"]

    found = read(tmp_path / "a", block_size=[1, 96], target_dtype=dtype("int4"))
    np.testing.assert_array_equal(found.dequantize(), codes.astype(np.float32) * np.repeat(scale, 96, 1))
    with pytest.raises(jq.QuantError, match="the values fit no blocks of the weight"):
        read(tmp_path / "b", target_dtype=dtype("int4"))
    with pytest.raises(jq.QuantError, match="a zero point is not a code of the type"):
        read(tmp_path / "c", zero=8, block_size=[1, 96], target_dtype=dtype("int4"))
    with pytest.raises(jq.QuantError, match="target_dtype must be an integer of 1 to 8 bits"):
        read(tmp_path / "d", block_size=[1, 96], target_dtype=dtype("int16"))


# -- activations ------------------------------------------------------------------------------------------------------

ATTENTION = "model.layers.0.self_attn"
OF_THE_CACHE = (
    "k_scale", "v_scale", "q_scale", "kv_scale", "attn.k_scale", "attn.q_scale", "k_proj.k_scale", "v_proj.v_scale",
    "qkv_proj.k_scale", "k_proj.output_scale", "v_proj.output_scale", "q_proj.output_scale", "prob_output_scale",
    "prob_scale", "k_cache_scale", "v_cache_scale", "k_cache.scale", "q.scale", "kv_cache_scaling_factor",
    "k_zero_point", "k_proj.output_zero_point", "k_proj.input_scale", "k_proj.input_global_scale",
    "k_proj.input_activation_scale", "k_proj.activation_scale", "k_proj.act_scale", "k_proj.input_scale_ub",
    "experts.w13_input_scale",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scales_of_activations(tmp_path, case):
    """Every name beside every format: what the file holds, in its own dtype, and named in ``info.activations``."""
    tensors, config, *metadata = CASES[case]
    prefix = "m.experts.up" if case == "mxfp4" else "0" if case == "torchao" else "m"
    owner = f"{ATTENTION}.k_proj"
    rename = lambda text: text.replace(prefix, owner, 1) if text.startswith(prefix) else text  # noqa: E731
    parts = {rename(name): array for name, array in tensors.items()}
    parts = {n: a for n, a in parts.items() if not n.endswith("activation_scale")}
    metadata = [{rename(k): v for k, v in found.items()} for found in metadata]
    config = json.loads(json.dumps(config).replace('"m"', json.dumps(owner)))
    scales = {f"{ATTENTION}.{name}": np.float32(0.01 * (i + 1)) for i, name in enumerate(OF_THE_CACHE)}
    folder = checkpoint(tmp_path, parts | scales, config, metadata=metadata[0] if metadata else None)
    params, info = jq.io.load_hf(folder, dtype=np.float16)
    assert sorted(info.activations) == sorted(scales)
    assert "describe activations" in str(info)
    for name, value in scales.items():
        assert params[name].dtype == np.float32
        assert params[name] == value
    assert sum(isinstance(leaf, jq.QTensor) for leaf in params.values()) == len(info.modules) - (
        case in ("aqlm", "vptq")
    )


@pytest.mark.parametrize(
    "name", ["m.input_scale", "m.output_scale", "attn.k_scale", "m.input_global_scale", "m.k_scale"]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_scales_of_activations_are_checked(tmp_path, name, bad):
    for case in ("fp8", "gptq", "bnb nf4"):
        tensors, config, *_ = CASES[case]
        folder = checkpoint(tmp_path / case, tensors | {name: np.array([1, bad], np.float32)}, config)
        with pytest.raises(
            jq.QuantError, match=rf"'{re.escape(name)}': values that describe activations must be finite"
        ):
            jq.io.load_hf(folder)


def test_all_bad_scales_are_named(tmp_path):
    tensors, config, *_ = CASES["fp8"]
    bad = {f"{n}.input_scale": np.float32(np.nan) for n in "abm"}
    with pytest.raises(jq.QuantError, match=r"tensors=\('a.input_scale', 'b.input_scale', 'm.input_scale'\), bad=3"):
        jq.io.load_hf(checkpoint(tmp_path, tensors | bad, config))


def test_gemma_turns_activations_off_with_zero(tmp_path):
    tensors, config, *_ = CASES["gemma"]
    parts = tensors | {"m.input_activation_scale": np.float32(0)}
    assert jq.io.load_hf(checkpoint(tmp_path / "a", parts, config))[0]["m.input_activation_scale"] == 0
    parts["m.input_activation_scale"] = np.float32(-1)
    with pytest.raises(jq.QuantError, match="finite, and scales not negative"):
        jq.io.load_hf(checkpoint(tmp_path / "b", parts, config))


# -- what accompanies a weight ----------------------------------------------------------------------------------------

NOT_NEGATIVE = {
    "fp8": "m.weight_scale_inv",
    "bnb nf4": "m.weight.absmax",
    "bnb nested": "m.weight.nested_absmax",
    "bnb int8": "m.SCB",
    "ct nvfp4": "m.weight_scale",
    "modelopt": "m.weight_scale",
    "gemma": "m.weight_scale",
}


@pytest.mark.parametrize("case", NOT_NEGATIVE)
def test_scales_that_are_magnitudes(tmp_path, case):
    tensors, config, *_ = CASES[case]
    value = np.array(tensors[NOT_NEGATIVE[case]])
    value.reshape(-1)[-1] = -1
    with pytest.raises(
        jq.QuantError, match=f"{re.escape(NOT_NEGATIVE[case])}': scales of this format are not negative"
    ):
        jq.io.load_hf(checkpoint(tmp_path, tensors | {NOT_NEGATIVE[case]: value}, config))


@pytest.mark.parametrize("bad", [0.0, -2.0, np.nan, np.inf])
def test_scales_of_whole_weights(tmp_path, bad):
    for case, name in (("ct nvfp4", "weight_global_scale"), ("modelopt", "weight_scale_2"), ("bitnet", "weight_scale")):
        tensors, config, *_ = CASES[case]
        value = np.full_like(tensors[f"m.{name}"], bad)
        with pytest.raises(
            jq.QuantError, match=rf"m.{name}': (there must be one positive scale|scales must be finite)"
        ):
            jq.io.load_hf(checkpoint(tmp_path / case, tensors | {f"m.{name}": value}, config))


def test_codes_are_finite(tmp_path):
    tensors, config, *_ = CASES["fp8"]
    for dtype, byte in ((E4M3, 0x7F), (E4M3, 0xFF), (ml_dtypes.float8_e5m2, 0x7C), (ml_dtypes.float8_e5m2, 0xFE)):
        codes = np.zeros(tensors["m.weight"].shape, np.uint8)
        codes[3, 5] = byte
        with pytest.raises(jq.QuantError, match="the codes of a weight must be finite; got bad=1"):
            jq.io.load_hf(checkpoint(tmp_path / f"{byte}", tensors | {"m.weight": codes.view(dtype)}, config))


def test_indices_of_codebooks(tmp_path):
    tensors, config, *_ = CASES["aqlm"]
    codes = tensors["m.codes"].astype(np.int16)
    codes[0, 0, 0] = tensors["m.codebooks"].shape[1]
    with pytest.raises(jq.QuantError, match="a code is beyond its codebook"):
        jq.io.load_hf(checkpoint(tmp_path / "a", tensors | {"m.codes": codes}, config))
    tensors, config, *_ = CASES["vptq"]
    perm = np.array(tensors["m.perm"])
    perm[0] = perm[1]
    with pytest.raises(jq.QuantError, match="perm must name every column once"):
        jq.io.load_hf(checkpoint(tmp_path / "b", tensors | {"m.perm": perm}, config))


# -- which format -----------------------------------------------------------------------------------------------------


def test_the_key_that_names_the_format(tmp_path):
    tensors, config, *_ = CASES["gptq"]
    own = {key: value for key, value in config["quantization_config"].items() if key != "quant_method"}
    match = r"has no quant_method, the key that names its format.*'bits'.*could be 'gptq' \(GPTQ\), 'awq' \(AWQ\)"
    with pytest.raises(jq.QuantError, match=match):
        jq.io.load_hf(checkpoint(tmp_path / "a", tensors, {"quantization_config": own}))
    with pytest.raises(jq.QuantError, match=match):
        jq.io.load_hf(checkpoint(tmp_path / "b", tensors, files=[("quantization_config.json", own)]))
    with pytest.raises(jq.QuantError, match=r"has no quant_method.*It could be 'gptq' \(GPTQ\), .*'vptq' \(VPTQ\)"):
        jq.io.load_hf(checkpoint(tmp_path / "c", {"x": np.ones(2, np.float32)}, {"quantization_config": {"a": 1}}))
    with pytest.raises(jq.QuantError, match="quant_method, the key that names the format, must be text"):
        jq.io.load_hf(checkpoint(tmp_path / "d", tensors, {"quantization_config": {"quant_method": 4}}))
    for bad in ([], "gptq", 4, False):
        with pytest.raises(jq.QuantError, match=r"'config.json': quantization_config must be a JSON object"):
            jq.io.load_hf(checkpoint(tmp_path / str(bad), tensors, {"quantization_config": bad}))
    (tmp_path / "d" / "config.json").write_text("[1]")
    with pytest.raises(jq.QuantError, match=r"config.json: the file must hold a JSON object"):
        jq.io.load_hf(tmp_path / "d")


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json", "quantization_config.json"])
def test_places_of_the_configuration(tmp_path, file):
    tensors, config, *_ = CASES["gptq"]
    right = jq.io.load_hf(checkpoint(tmp_path / "a", tensors, config))[0]["m.weight"].dequantize()
    own = config["quantization_config"]
    files = [] if file == "config.json" else [(file, own)]
    model = {"text_config": {"quantization_config": own}} if file == "config.json" else {}
    params, info = jq.io.load_hf(checkpoint(tmp_path / "b", tensors, model, files=files))
    np.testing.assert_array_equal(params["m.weight"].dequantize(), right)
    assert info.format == "GPTQ"
