"""MLX's files and configurations, against decoders in NumPy that go bit by bit."""

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_files import checkpoint, values
from narrowed import present

import jaxquant as jq
from jaxquant import QuantError
from jaxquant.io.sharded import Checkpoint

RNG = np.random.default_rng(0)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
WIDTHS = {"affine": 4, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}
SIZES = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}


def words(codes, bits):
    """The bits of each row, the lowest first, in 32-bit words."""
    places = (codes[..., None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    flat = places.reshape(*codes.shape[:-1], -1).astype(np.uint32)
    return (flat.reshape(*flat.shape[:-1], -1, 32) << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def e4m3(patterns):
    """The values of fp8 bit patterns, by the format's definition: 4 bits of exponent, 3 of mantissa, bias 7."""
    exponent, mantissa = (patterns >> 3 & 15).astype(np.int32), (patterns & 7).astype(np.float32)
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(patterns & 128, -size, size).astype(np.float32)


def module(mode="affine", bits=None, size=None, shape=(6, 128), prefix="m", dtype: Any = np.float16):
    """Tensors of a module, and the values that they stand for."""
    bits, size = bits or WIDTHS[mode], size or SIZES[mode]
    codes = RNG.integers(0, 1 << bits, shape).astype(np.uint8)
    groups = (*shape[:-1], shape[-1] // size)
    if mode == "affine":
        scale, bias = (RNG.normal(size=groups).astype(dtype) for _ in range(2))
        parts = {"scales": scale, "biases": bias}
        wanted = codes.astype(np.float32) * np.repeat(scale, size, -1) + np.repeat(bias, size, -1).astype(np.float32)
    else:
        if mode == "nvfp4":
            scale = RNG.integers(1, 127, groups).astype(np.uint8)
            factor = e4m3(scale)
        else:
            scale = RNG.integers(110, 140, groups).astype(np.uint8)
            factor = 2.0 ** (scale.astype(np.float32) - 127)
        if bits == 8:
            codes = np.where(codes & 127 == 127, 0, codes).astype(np.uint8)  # no NaN
        parts = {"scales": scale}
        wanted = (e4m3(codes) if bits == 8 else E2M1[codes]) * np.repeat(factor, size, -1)
    return {f"{prefix}.weight": words(codes, bits)} | {f"{prefix}.{n}": a for n, a in parts.items()}, wanted


def loaded(folder, tensors, config):
    return jq.io.load_hf(checkpoint(folder, tensors, config, metadata={"format": "mlx"}))


def same(leaf, wanted):
    np.testing.assert_array_equal(values(leaf, np.float32), np.where(wanted == 0, 0, wanted))


def places(quantization):
    """Where configurations are found."""
    return [
        {"quantization": quantization},
        {"quantization": quantization, "quantization_config": quantization},
        {"quantization_config": quantization},
        {"text_config": {"quantization_config": quantization}},
        {"quantization": quantization, "quantization_config": {"quant_method": "fp8"}},  # of what it was made from
    ]


@pytest.mark.parametrize("place", range(5))
def test_wherever_the_configuration_is(place, tmp_path):
    tensors, wanted = module(bits=5, size=32)
    params, info = loaded(tmp_path, tensors, places({"group_size": 32, "bits": 5})[place])
    assert info.format == "MLX / metal"
    same(params["m.weight"], wanted)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("lead", [(6,), (3, 6)], ids=["matrix", "experts"])
def test_modes(mode, lead, tmp_path):
    tensors, wanted = module(mode, shape=(*lead, 64))
    config = {"group_size": SIZES[mode], "bits": WIDTHS[mode], "mode": mode}
    params, _ = loaded(tmp_path, tensors, {"quantization": config})
    assert (params["m.weight"].qtype, params["m.weight"].shape) == (mode, (*lead, 64))
    same(params["m.weight"], wanted)


@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_experts(bits, tmp_path):
    name = "model.layers.0.mlp.switch_mlp.gate_proj"
    tensors, wanted = module(bits=bits, size=32, shape=(3, 6, 96), prefix=name)
    tensors[f"{name}.bias"] = np.ones((3, 6), np.float16)
    params, _ = loaded(tmp_path, tensors, {"quantization": {"group_size": 32, "bits": bits}})
    same(params[f"{name}.weight"], wanted)
    np.testing.assert_array_equal(params[f"{name}.bias"], tensors[f"{name}.bias"])


def test_modules_with_settings_of_their_own(tmp_path):
    """Four settings; one with no mode, which is affine whatever the rest is; one module in float, one as the rest."""
    first, a = module("mxfp4", prefix="a")
    second, b = module(bits=8, prefix="b")
    third, c = module("nvfp4", prefix="c")
    fourth, d = module(bits=3, size=128, prefix="d.e", dtype=ml_dtypes.bfloat16)
    fifth, f = module("mxfp4", prefix="f")
    config = {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
        "b": {"group_size": 64, "bits": 8},
        "c": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "d.e": {"group_size": 128, "bits": 3, "mode": "affine"},
        "f": True,
        "g": False,
    }
    tensors = {**first, **second, **third, **fourth, **fifth, "g.weight": np.ones((2, 4), np.float32)}
    params, info = loaded(tmp_path, tensors, {"quantization": config, "quantization_config": config})
    for name, wanted in {"a": a, "b": b, "c": c, "d.e": d, "f": f}.items():
        same(params[f"{name}.weight"], wanted)
    assert info.floats == ("g.weight",)


@pytest.mark.parametrize(
    "config", [{}, {"bits": 4}, {"group_size": 64}, {"bits": 4, "group_size": 64, "m": {"mode": "affine"}}]
)
def test_what_is_not_stated_is_what_mlx_has_or_follows_from_the_shapes(config, tmp_path):
    tensors, wanted = module()
    same(loaded(tmp_path, tensors, {"quantization": config or {"mode": "affine"}})[0]["m.weight"], wanted)


def test_two_settings_that_shapes_do_not_tell_apart(tmp_path):
    """4 bits in groups of 64 and 8 bits in groups of 32 have the same shapes: the configuration decides."""
    tensors, wanted = module(bits=8, size=32, shape=(4, 64))
    one, _ = loaded(tmp_path, tensors, {"quantization": {"bits": 8, "group_size": 32}})
    two, _ = loaded(tmp_path, tensors, {"quantization": {"bits": 4, "group_size": 64}})
    same(one["m.weight"], wanted)
    assert two["m.weight"].shape == (4, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mxfp6"}, "mode of the quantization is not known.*mxfp6"),
        ({"mode": ["affine"]}, "mode of the quantization is not known"),
        ({"mode": "mxfp4"}, "mxfp4 has no biases"),
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8"),
        ({"bits": 8}, "the group size and bits do not fit the shapes"),
        ({"group_size": 32}, "the group size and bits do not fit the shapes"),
        ({"group_size": -64}, "group_size must be a positive integer"),
        ({"group_size": True}, "group_size must be a positive integer"),
        ({"m": False}, "says that it is not quantized, but it has scales"),
        ({"m": "affine"}, "the configuration of a module must be a boolean or an object"),
        ({"m": {"mode": "affine", "bits": 3}}, "the group size and bits do not fit the shapes"),
        ({"model.m": {"bits": 8, "group_size": 32}}, "configuration is of a module of another path.*model.m"),
    ],
)
def test_configurations_that_do_not_fit(change, message, tmp_path):
    tensors, _ = module()
    with pytest.raises(QuantError, match=f"m.weight.*{message}|m.biases.*{message}"):
        loaded(tmp_path, tensors, {"quantization": {"group_size": 64, "bits": 4, **change}})


@pytest.mark.parametrize(
    ("mode", "spoil", "message"),
    [
        ("affine", {"m.biases": None}, r"m\.biases.*missing"),
        ("affine", {"m.scales": np.ones((6, 2), np.uint8)}, r"m\.scales.*dtype must be float16"),
        ("mxfp4", {"m.scales": np.ones((6, 4), np.float16)}, r"m\.scales.*dtype must be uint8"),
        ("mxfp4", {"m.scales": np.full((6, 4), 255, np.uint8)}, r"m\.scales.*must be finite"),
        ("nvfp4", {"m.scales": np.full((6, 8), 127, np.uint8)}, r"m\.weight.*must be finite"),
        ("mxfp8", {"m.scales": np.ones((5, 4), np.uint8)}, r"m\.scales.*must have the shape \[6, 4\]"),
        ("mxfp8", {"m.scales": np.ones((6, 4, 1), np.uint8)}, r"m\.scales.*must have the shape"),
        ("affine", {"m.biases": np.ones((6, 3), np.float16)}, r"m\.biases.*must have the shape \[6, 2\]"),
    ],
)
def test_damaged_modules_are_named(mode, spoil, message, tmp_path):
    tensors = module(mode)[0] | spoil
    tensors = {name: array for name, array in tensors.items() if array is not None}
    with pytest.raises(QuantError, match=message):
        loaded(tmp_path, tensors, {"quantization": {"mode": mode}})


def test_a_quantized_checkpoint_of_mlx_is_not_quantized_again(tmp_path):
    tensors = module()[0] | {"n.weight": np.ones((4, 64), np.float32)}
    checkpoint(tmp_path / "in", tensors, {"quantization": {"group_size": 64, "bits": 4}})
    with pytest.raises(QuantError, match=re.escape("the checkpoint is quantized already")):
        jq.io.quantize_hf(tmp_path / "in", tmp_path / "out", [jq.Rule("n", jq.recipes.w8a16())])


@pytest.mark.parametrize(
    "mode, bits", [("affine", 4), ("affine", 3), ("affine", 6), ("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)]
)
def test_what_was_read_is_written_again_byte_for_byte(mode, bits, tmp_path):
    tensors = {}
    for prefix, kind, width, size in (("m", mode, bits, None), ("n", mode, bits, None), ("other", "affine", 8, 32)):
        tensors |= module(kind, width, size, prefix=prefix)[0]
    own = {"group_size": 32, "bits": 8, "mode": "affine"}
    config = {"group_size": SIZES[mode], "bits": bits, "mode": mode, "other": own}
    params, _ = loaded(tmp_path / "in", tensors, {"quantization": config})
    jq.io.save_hf(tmp_path / "out", params, format="mlx")
    written = Checkpoint(tmp_path / "out")
    assert written.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(written.array(name), array)
    found = present(written.json("config.json"))
    assert found["quantization"] == found["quantization_config"] == config
