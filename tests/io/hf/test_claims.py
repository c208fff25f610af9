"""What makes a weight a quantized one: its tensors by every name and of every rank; nothing else passes as an array."""

import json
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_files import checkpoint, stream, unit, values

import jaxquant as jq

pytestmark = [pytest.mark.every, pytest.mark.filterwarnings("ignore:.*gives its weights alone")]

E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
LINEAR, EXPERTS, KERNEL = (6, 64), (3, 6, 64), (6, 4, 3, 3)
MODULE, PARAMETER = "block.proj", "block.experts.gate_up_proj"


def fp8(rng, *shape):
    return rng.normal(size=shape).astype(E4M3)


def scales(rng, *shape):
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


def nibbles(codes):
    """Two codes per byte along the last axis, the first in the low half."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def powers(exponents):
    return np.exp2(exponents.astype(np.float32) - 127)


def config(method, **kwargs):
    return {"dtype": "float32", "quantization_config": {"quant_method": method, **kwargs}}


def ct(form, **weights):
    return config("compressed-tensors", format=form, config_groups={"g": {"targets": ["Linear"], "weights": weights}})


def named(parts, *, parameter, rename=lambda part: part.removeprefix("weight")):
    """Tensors of a module, or the same of a parameter, and the name of the weight."""
    if parameter:
        return {PARAMETER + rename(part): array for part, array in parts.items()}, PARAMETER
    return {f"{MODULE}.{part}": array for part, array in parts.items()}, f"{MODULE}.weight"


def ct_int8(rng, shape, parameter):
    rows = shape[: -(len(shape) - 1)] if len(shape) == 4 else shape[:-1]
    codes, scale = rng.integers(-128, 128, shape).astype(np.int8), scales(rng, *rows)
    full = scale.reshape(*rows, *(1,) * (len(shape) - len(rows)))
    given = full if len(shape) != 4 else scale[:, None]  # a kernel's may be [out, 1]
    parts = {"weight": codes, "weight_scale": given}
    return named(parts, parameter=parameter), ct("int-quantized", num_bits=8, strategy="channel"), codes * full


def ct_float(rng, shape, parameter):
    codes, scale = fp8(rng, *shape), scales(rng, shape[0], *(1,) * (len(shape) - 1))
    parts = {"weight": codes, "weight_scale": scale}
    return named(parts, parameter=parameter), ct("float-quantized", num_bits=8), codes.astype(np.float32) * scale


def ct_pack(rng, shape, parameter):
    bits, groups = 4, (shape[-1] // 32 if shape[-1] % 32 == 0 else 1)
    codes = rng.integers(0, 16, shape)
    many = (*shape[:-1], groups) if len(shape) < 4 else (shape[0], 1, 1, 1)
    scale, zero = scales(rng, *many), rng.integers(0, 16, many)
    parts = {
        "weight_packed": stream(codes, bits).view(np.int32),
        "weight_scale": scale,
        "weight_shape": np.array(shape, np.int64),
    }
    wide = lambda v: np.repeat(v, shape[-1] // groups, -1) if len(shape) < 4 else v  # noqa: E731
    if len(shape) < 4:
        parts["weight_zero_point"] = np.swapaxes(stream(np.swapaxes(zero, -1, -2), bits), -1, -2).view(np.int32).copy()
    else:
        zero = np.full(many, 8)
    size = {"group_size": 32, "strategy": "group"} if len(shape) < 4 else {"strategy": "channel"}
    want = (codes - wide(zero)).astype(np.float32) * wide(scale)
    return named(parts, parameter=parameter), ct("pack-quantized", num_bits=bits, **size), want


def ct_mxfp4(rng, shape, parameter):
    codes, exponents = rng.integers(0, 16, shape), rng.integers(118, 130, (*shape[:-1], 2)).astype(np.uint8)
    parts = {"weight_packed": nibbles(codes), "weight_scale": exponents}
    want = E2M1[codes] * np.repeat(powers(exponents), 32, -1)
    return named(parts, parameter=parameter), ct("mxfp4-pack-quantized", num_bits=4, group_size=32), want


def ct_nvfp4(rng, shape, parameter):
    codes, local = rng.integers(0, 16, shape), np.abs(fp8(rng, *shape[:-1], 4))
    top = np.exp2(rng.integers(1, 9, shape[:-2] or (1,))).astype(np.float32)
    parts = {"weight_packed": nibbles(codes), "weight_scale": local, "weight_global_scale": top}
    unit = top.reshape(*shape[:-2], 1, 1)
    want = E2M1[codes] * np.repeat(local.astype(np.float32) / unit, 16, -1)
    return named(parts, parameter=parameter), ct("nvfp4-pack-quantized", num_bits=4, group_size=16), want


def blocks(rng, shape, parameter, scale="weight_scale_inv", exponents=False):
    """Blocks of 4 x 48: the last ones are short."""
    codes = fp8(rng, *shape)
    scale_of = rng.integers(120, 130, (*shape[:-2], 2, 2)).astype(np.uint8)
    value = powers(scale_of) * np.float32(1 if exponents else 1.25)
    want = codes.astype(np.float32) * np.repeat(np.repeat(value, 4, -2)[..., : shape[-2], :], 48, -1)[..., : shape[-1]]
    parts = {"weight": codes, scale: scale_of.view(E8M0) if exponents else value}
    return named(parts, parameter=parameter), config("fp8", weight_block_size=[4, 48]), want


def fp4_experts(rng, shape, parameter, scale="weight_scale_inv"):
    codes, exponents = rng.integers(0, 16, shape), rng.integers(118, 130, (*shape[:-1], 2)).astype(np.uint8)
    parts = {"weight": nibbles(codes).view(np.int8), scale: exponents.view(E8M0)}
    want = E2M1[codes] * np.repeat(powers(exponents), 32, -1)
    return named(parts, parameter=parameter), config("fp8", weight_block_size=[128, 128]), want


def fp8_scaled(rng, shape, parameter, of=(), method="fp8", scale="weight_scale"):
    """One scale, or those of ``of``, which says their shape beside the weight."""
    codes, value = fp8(rng, *shape), scales(rng, *of)
    parts = {"weight": codes, scale: value.squeeze() if not of else value}
    want = codes.astype(np.float32) * value.reshape(*of, *(1,) * (len(shape) - len(of)))
    if method == "modelopt":
        rename = lambda part: part.replace("weight", "_weight") if "scale" in part else ""  # noqa: E731
        return named(parts, parameter=parameter, rename=rename), config(method, quant_algo="FP8"), want
    return named(parts, parameter=parameter), config(method), want


def fbgemm(rng, shape, as_stored):
    """Experts [experts, in, out] with a scale per output; those of the second product are stored as a column."""
    experts, _, out = shape
    codes, value = fp8(rng, *shape), scales(rng, experts, 1, out)
    parts = {"weight": codes, "weight_scale": value.reshape(as_stored)}
    return named(parts, parameter=True), config("fbgemm_fp8"), codes.astype(np.float32) * value


def modelopt_fp4(rng, shape, parameter, *, transposed=False, per_expert=False):
    codes, local = rng.integers(0, 16, shape), np.abs(fp8(rng, *shape[:-1], shape[-1] // 16))
    unit = scales(rng, shape[0]) if per_expert else scales(rng)
    factor = local.astype(np.float32) * unit.reshape(*unit.shape, *(1,) * (len(shape) - unit.ndim))
    want = E2M1[codes] * np.repeat(factor, 16, -1)
    turned = (lambda v: np.ascontiguousarray(np.swapaxes(v, -1, -2))) if transposed else lambda v: v
    parts = {"weight": turned(nibbles(codes)), "weight_scale": turned(local), "weight_scale_2": unit}
    rename = lambda part: part.replace("weight", "_weight") if "scale" in part else ""  # noqa: E731
    return named(parts, parameter=parameter, rename=rename), config("modelopt", quant_algo="NVFP4"), turned(want)


def modelopt_mxfp8(rng, shape, parameter):
    codes, exponents = fp8(rng, *shape), rng.integers(118, 130, (*shape[:-1], 2)).astype(np.uint8)
    rename = lambda part: part.replace("weight", "_weight") if "scale" in part else ""  # noqa: E731
    parts = {"weight": codes, "weight_scale": exponents}
    want = codes.astype(np.float32) * np.repeat(powers(exponents), 32, -1)
    return named(parts, parameter=parameter, rename=rename), config("modelopt", quant_algo="MXFP8"), want


def bnb_four_bits(rng, shape, parameter):
    """Codes of bitsandbytes itself, as a weight of another shape."""
    t, _ = unit("bnb_nf4_48x128_b64_bfloat16")
    parts = {name: array for name, array in t.items() if name.startswith("weight")}
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(parts[key].tobytes()) | {"shape": list(shape)}
    parts[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    want = t["ref_dequant"].astype(np.float32).reshape(shape)
    return named(parts, parameter=parameter), config("bitsandbytes", load_in_4bit=True), want


def bnb_int8(rng, shape, parameter):
    codes, top = (
        rng.integers(-127, 128, shape).astype(np.int8),
        (2.0 ** rng.integers(0, 4, shape[0])).astype(np.float32),
    )
    parts = {"weight": codes, "SCB": top * np.float32(127)}
    full = top.reshape(-1, *(1,) * (len(shape) - 1))
    return named(parts, parameter=parameter), config("bitsandbytes", load_in_8bit=True), codes * full


def quanto(rng, shape, parameter):
    codes, scale = rng.integers(-127, 128, shape).astype(np.int8), scales(rng, shape[0], *(1,) * (len(shape) - 1))
    parts = {"weight._data": codes, "weight._scale": scale}
    return named(parts, parameter=parameter), config("quanto"), codes * scale


def quanto_int4(rng, shape, parameter):
    """Without groups: rows share bytes, the first half of them in the low bits."""
    codes, one = rng.integers(0, 16, shape).astype(np.uint8), (1,) * (len(shape) - 1)
    scale = (2.0 ** rng.integers(-3, 3, (shape[0], *one))).astype(np.float32)
    shift = (rng.integers(0, 8, scale.shape) * scale).astype(np.float32)
    half = shape[0] // 2
    parts = {"weight._data._data": codes[:half] | codes[half:] << 4, "weight._scale": scale, "weight._shift": shift}
    return named(parts, parameter=parameter), config("quanto"), codes * scale - shift


#: name -> what makes ((tensors, name of the weight), config.json, value), and its arguments
CASES: dict[str, tuple[Any, ...]] = {
    f"{make.__name__} {len(shape)}-D{' parameter' * parameter}": (make, shape, parameter)
    for make, shapes in {
        ct_int8: (LINEAR, EXPERTS, KERNEL),
        ct_float: (LINEAR, EXPERTS, KERNEL),
        ct_pack: (LINEAR, EXPERTS, KERNEL),
        ct_mxfp4: (LINEAR, EXPERTS),
        ct_nvfp4: (LINEAR, EXPERTS),
        blocks: (LINEAR, EXPERTS),
        fp4_experts: (LINEAR, EXPERTS),
        fp8_scaled: (LINEAR, EXPERTS, KERNEL),
        modelopt_fp4: (LINEAR, EXPERTS),
        modelopt_mxfp8: (LINEAR, EXPERTS),
        bnb_four_bits: ((48, 128), (3, 16, 128), (16, 48, 8), (32, 64, 1, 3)),
        quanto: (LINEAR, EXPERTS, KERNEL),
        quanto_int4: (LINEAR, KERNEL),
    }.items()
    for shape in shapes
    for parameter in (False, True)
}
CASES |= {
    "scale and exponents": (blocks, LINEAR, False, "scale", True),
    "weight_scale_inv and exponents": (blocks, LINEAR, False, "weight_scale_inv", True),
    "scale of experts": (fp4_experts, LINEAR, False, "scale"),
    "scale of blocks of a parameter": (blocks, EXPERTS, True, "weight_scale"),
    "one scale per expert": (fp8_scaled, EXPERTS, True, (3,)),
    "one scale per expert, kept axes": (fp8_scaled, EXPERTS, True, (3, 1, 1), "fp8", "weight_scale_inv"),
    "one scale per row": (fp8_scaled, EXPERTS, True, (3, 6)),
    "one scale per output": (fp8_scaled, KERNEL, False, (6,)),
    "rows of FBGEMM": (fp8_scaled, LINEAR, False, (6, 1), "fbgemm_fp8"),
    "FBGEMM experts": (fbgemm, (3, 16, 32), (3, 1, 32)),
    "FBGEMM experts, column": (fbgemm, (3, 16, 32), (3, 32, 1)),
    "FBGEMM experts, wide input": (fbgemm, (3, 32, 16), (3, 16, 1)),
    "FBGEMM experts, square": (fbgemm, (3, 16, 16), (3, 16, 1)),
    "ModelOpt": (fp8_scaled, EXPERTS, True, (), "modelopt"),
    "ModelOpt per expert": (fp8_scaled, EXPERTS, True, (3,), "modelopt"),
    "ModelOpt per expert, kept axes": (fp8_scaled, EXPERTS, True, (3, 1, 1), "modelopt"),
    "ModelOpt per row": (fp8_scaled, EXPERTS, True, (3, 6, 1), "modelopt"),
    "ModelOpt stacked": (fp8_scaled, EXPERTS, False, (3,), "modelopt"),
    "bitsandbytes int8": (bnb_int8, LINEAR, False),
    "bitsandbytes int8 kernel": (bnb_int8, KERNEL, False),
}


def made(name):
    rng = np.random.default_rng(len(name))
    if name == "ModelOpt fp4, [in, out]":
        return modelopt_fp4(rng, EXPERTS, True, transposed=True)
    if name == "ModelOpt fp4, per expert":
        return modelopt_fp4(rng, EXPERTS, True, transposed=True, per_expert=True)
    make, *args = CASES[name]
    return make(rng, *args)


NAMES = [*CASES, "ModelOpt fp4, [in, out]", "ModelOpt fp4, per expert"]


def beside(settings, weight):
    """Tensors that may stand beside the weight: they stay as they are."""
    parameter = weight == PARAMETER
    found: dict[str, Any] = {f"{weight}_bias" if parameter else f"{MODULE}.bias": np.ones(6, np.float32)}
    if settings["quantization_config"]["quant_method"] in ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors"):
        found[f"{weight}_input_scale" if parameter else f"{MODULE}.input_scale"] = np.float32(1)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_values(tmp_path, name):
    (tensors, weight), settings, want = made(name)
    other = beside(settings, weight)
    params, info = jq.io.load_hf(checkpoint(tmp_path, tensors | other, settings))
    assert set(params) == {weight, *other}
    assert isinstance(params[weight], jq.QTensor)
    assert params[weight].shape == want.shape
    dtype = params[weight].dtype
    np.testing.assert_array_equal(values(params[weight], dtype), np.where(want == 0, 0, want).astype(dtype))
    assert list(info.modules) == [weight]


@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_needed_and_fits(tmp_path, name):
    """No codes without scales, no scales without codes, no scales for more than there is: each is named."""
    (tensors, weight), settings, _ = made(name)
    prefix = re.escape(weight.removesuffix(".weight"))
    for i, part in enumerate(tensors):
        rest = {n: a for n, a in tensors.items() if n != part}
        if not part.endswith("_zero_point"):
            with pytest.raises(jq.QuantError, match=prefix):
                jq.io.load_hf(checkpoint(tmp_path / f"without {i}", rest, settings))
        array = tensors[part]
        if re.search("scale|zero|shift|absmax|SCB|shape", part) and array.ndim:
            longer = np.concatenate([array, array, array[:1]])
            with pytest.raises(jq.QuantError, match=prefix):
                jq.io.load_hf(checkpoint(tmp_path / f"longer {i}", tensors | {part: longer}, settings))


LINEAR_FP8 = {"l.q_proj.weight": np.ones((4, 8), E4M3), "l.q_proj.weight_scale": np.float32(1)}
FUSED = "l.experts.down_proj"


@pytest.mark.parametrize("method", ["fp8", "modelopt", "compressed-tensors", "gptq", "bitsandbytes", None])
@pytest.mark.parametrize(
    "tensors",
    [
        {FUSED: np.ones((2, 4, 8), E4M3)},
        {FUSED: np.ones((2, 4, 8), ml_dtypes.float8_e5m2)},
        {FUSED: np.full((2, 4, 8), 3, np.uint8)},
        {FUSED: np.full((2, 4, 8), -3, np.int8)},
        {FUSED: np.full((4, 8), -(1 << 30), np.int32)},
        {FUSED: np.full((4, 8), 1 << 30, np.uint32)},
        {FUSED: np.full((4, 8), -300, np.int16)},
        {FUSED: np.ones(8, np.int8), f"{FUSED}.scales": np.ones(8, np.float32)},
        {FUSED: np.ones((2, 8), np.int32), f"{FUSED}_zeros": np.ones(8, np.float32)},
        {f"{FUSED}_blocks": np.full((2, 4, 1, 16), 7, np.uint8), f"{FUSED}_scales": np.full((2, 4, 1), 127, np.uint8)},
        {f"{FUSED}_exponents": np.ones((2, 4), E8M0)},
    ],
)
def test_codes_do_not_pass_as_arrays(tmp_path, method, tensors):
    """Codes that nothing claims, in a directory with a weight that is fine and in one without a configuration."""
    fine = LINEAR_FP8 if method in ("fp8", "modelopt", "compressed-tensors") else {}
    settings = config(method) if method else {}
    with pytest.raises(jq.QuantError, match=rf"{FUSED}.*(codes|scales|configuration)"):
        jq.io.load_hf(checkpoint(tmp_path, fine | tensors, settings))


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize(
    "method", ["fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "gptq", "bitsandbytes", "quanto"]
)
def test_a_parameter_with_the_scales_of_a_module(tmp_path, method, part):
    """``X`` beside ``X.weight_scale``: a parameter by one name and a module by the other, which no format has."""
    for codes in (np.ones((2, 4, 8), E4M3), np.full((4, 8), -3, np.int8)):
        tensors = {FUSED: codes, f"{FUSED}.{part}": np.full((4, 1), 2, np.float32)}
        with pytest.raises(jq.QuantError, match=rf"{FUSED}.*(codes without|scales without|missing|unknown)"):
            jq.io.load_hf(checkpoint(tmp_path, tensors, config(method)))


@pytest.mark.parametrize("value", [np.float32(1), np.ones((2, 1, 4), np.float32)])
@pytest.mark.parametrize("name", [f"{FUSED}_scale", "l.wq_a.weight_scale_inv", "l.ffn.w1.scale", f"{FUSED}_scale_inv"])
def test_scales_without_codes(tmp_path, name, value):
    with pytest.raises(jq.QuantError, match=re.escape(name.partition("_scale")[0].partition(".weight")[0])):
        jq.io.load_hf(checkpoint(tmp_path, LINEAR_FP8 | {name: value}, config("fp8")))


def test_a_scale_that_may_belong_to_two_axes(tmp_path):
    """[experts, n] for [experts, n, n] in a parameter, whose axes have no order by themselves."""
    tensors = {FUSED: np.ones((2, 8, 8), E4M3), f"{FUSED}_weight_scale": np.ones((2, 8), np.float32)}
    with pytest.raises(jq.QuantError, match="fit no blocks"):
        jq.io.load_hf(checkpoint(tmp_path, tensors, config("modelopt")))


@pytest.mark.parametrize("counts", [(2, 3), (4, 2), (6, 2)])
def test_blocks_are_not_guessed(tmp_path, counts):
    """Equal parts of a weight are no blocks of the configured size."""
    tensors = {"l.q.weight": np.ones((200, 192), E4M3), "l.q.weight_scale_inv": np.ones(counts, np.float32)}
    for settings in (config("fp8"), config("fp8", weight_block_size=[128, 128])):
        with pytest.raises(jq.QuantError, match="fit no blocks"):
            jq.io.load_hf(checkpoint(tmp_path, tensors, settings))


INTEGERS = {
    "position_ids": np.arange(8, dtype=np.int64)[None],
    "position_ids_32": np.arange(8, dtype=np.int32)[None],
    "relative_position_index": np.arange(64, dtype=np.int32).reshape(8, 8),
    "gate.tid2eid": np.full((100, 6), 255, np.int32),
    "tokens_per_expert": np.full(8, 3_000_000_00, np.int32),
    "num_batches_tracked": np.int64(7),
    "attn.mask": np.tril(np.ones((1, 1, 8, 8), np.uint8)),
    "attn.keep": np.ones((4, 8), np.bool_),
    "none_yet": np.full((4, 8), -1, np.int32),
    "spiece_model": np.arange(200, dtype=np.uint8),
    "logit_scale": np.float32(4.6),
    "attn.k_scale": np.ones(8, np.float32),
    "swin.logit_scale": np.ones((3, 1, 1), np.float32),
    "hc_attn_scale": np.ones(3, np.float32),
}


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_integers_that_are_no_codes(tmp_path, method):
    """Positions, tables, counts, masks and bytes stay as they are."""
    params, _ = jq.io.load_hf(checkpoint(tmp_path, LINEAR_FP8 | INTEGERS, config(method)))
    for name, array in INTEGERS.items():
        np.testing.assert_array_equal(params[name], array)
        assert params[name].dtype == array.dtype


def test_an_unknown_part_of_a_parameter(tmp_path):
    """What belongs to a fused weight by its name, and no reader takes, is not left out."""
    (tensors, weight), settings, _ = made("ModelOpt")
    for part in ("_pre_quant_scale", "_weight_zero_point"):
        with pytest.raises(jq.QuantError, match=f"{weight}{part}.*unknown tensor"):
            jq.io.load_hf(checkpoint(tmp_path, tensors | {weight + part: np.ones(64, np.float32)}, settings))


def test_groups_of_a_quanto_kernel(tmp_path):
    """Groups of 128 over what follows the first axis, which runs across the axes of the kernel."""
    rng, shape = np.random.default_rng(3), (4, 32, 2, 4)
    codes = rng.integers(0, 16, (8, 128)).astype(np.uint8)
    scale = (2.0 ** rng.integers(-3, 3, (8, 1))).astype(np.float32)
    shift = 3 * scale
    tensors = {"c.weight._data._data": codes[:4] | codes[4:] << 4, "c.weight._scale": scale, "c.weight._shift": shift}
    folder = checkpoint(tmp_path, tensors, config("quanto"))
    params, _ = jq.io.load_hf(folder, shapes={"c": shape})
    np.testing.assert_array_equal(values(params["c.weight"], np.float32), (codes * scale - shift).reshape(shape))
    with pytest.raises(jq.QuantError, match="given shape does not fit"):
        jq.io.load_hf(folder, shapes={"c": (4, 32, 2, 5)})


def test_torchao_experts(tmp_path):
    """A parameter that is no module's weight, of three axes."""
    rng = np.random.default_rng(4)
    codes, scale = rng.integers(-128, 128, EXPERTS).astype(np.int8), scales(rng, 3, 6, 1)
    described = {"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": ["qdata", "scale"]}
    tensors = {"l.experts._down_proj_qdata": codes, "l.experts._down_proj_scale": scale}
    folder = checkpoint(tmp_path, tensors, config("torchao"), metadata={FUSED: json.dumps(described)})
    params, _ = jq.io.load_hf(folder)
    np.testing.assert_array_equal(values(params[FUSED], np.float32), codes * scale)
