"""Checkpoints for other libraries: their own files written again byte for byte, and what does not fit refused."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from io_files import assert_same
from narrowed import present

import jaxquant as jq
from jaxquant import QuantError, QuantSpec
from jaxquant.core.qtensor import from_codes
from jaxquant.io.sharded import Checkpoint

# Weights are what is read here, also of files that say how activations are quantized.
pytestmark = pytest.mark.filterwarnings("ignore:.*gives its weights alone")

MODELS = Path(__file__).parents[1] / "golden" / "models"
#: Golden checkpoint -> (format, activations, keys of its config that must be the same).
REWRITTEN = {
    "ct_w4a16_g64_asym": ("compressed-tensors", None, ("format", "ignore", "quant_method")),
    "ct_w4a16_g32_gptq_actweight": ("compressed-tensors", None, ("format", "ignore", "quant_method")),
    "ct_w8a8_int8": ("compressed-tensors", "int8", ("format", "ignore", "quant_method")),
    "ct_fp8_dynamic": ("compressed-tensors", "float8_e4m3fn", ("format", "ignore", "quant_method")),
    "ct_mxfp4a16": ("compressed-tensors", None, ("format", "ignore", "quant_method")),
    "gptq_w4g64_sym": ("gptq", None, ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method")),
    "gptq_w3g64_sym": ("gptq", None, ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method")),
    "gptq_w4g32_asym_v2": ("gptq", None, ("bits", "group_size", "sym", "checkpoint_format", "quant_method")),
    "gptq_w4g64_actorder": ("gptq", None, ("bits", "group_size", "sym", "desc_act", "quant_method")),
    "awq_gemm_w4g64": ("awq", None, ("bits", "group_size", "zero_point", "version", "quant_method")),
    "bnb_nf4": (
        "bitsandbytes",
        None,
        ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "load_in_4bit", "quant_method"),
    ),
    "bnb_nf4_dq": ("bitsandbytes", None, ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "quant_method")),
}


def weight(out=64, width=64, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(out, width)) * np.exp(rng.normal(size=(out, 1))), jnp.float32)


def quantized(qtype, w=None, **fields: Any):
    fields = {"scale_dtype": "float16"} | fields if qtype not in ("mxfp4", "nvfp4") else fields
    if "group_size" in fields:
        fields["granularity"] = "per_group"
    return jq.quantize(weight() if w is None else w, QuantSpec(qtype, **fields), reduce_axes=(-1,))


@pytest.mark.parametrize("name", REWRITTEN)
def test_the_files_of_other_libraries_are_written_again_byte_for_byte(name, tmp_path):
    format, act, keys = REWRITTEN[name]
    params, info = jq.io.load_hf(MODELS / name)
    act = None if act is None else QuantSpec(act)
    jq.io.save_hf(tmp_path / "out", params, format=format, act=act, config=info.model)
    source, written = Checkpoint(MODELS / name), Checkpoint(tmp_path / "out")
    assert written.tensors == source.tensors
    for tensor in source.tensors:
        if not tensor.endswith("bitsandbytes__nf4"):  # JSON, with the keys in another order
            assert_same(written.array(tensor), source.array(tensor))
        else:
            texts = (json.loads(bytes(file.array(tensor))) for file in (source, written))
            assert next(texts) == next(texts)
    before, after = (present(file.json("config.json"))["quantization_config"] for file in (source, written))
    for key in keys:
        assert after.get(key) == before.get(key), key


# -- conversion without quantizing anew --------------------------------------------------------------------------------


def values(params):
    """In float32: some formats leave the dtype of the result to the scales."""
    leaves = {n: x.dequantize(jnp.float32) if isinstance(x, jq.QTensor) else x for n, x in params.items()}
    return {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    "name, format",
    [
        ("gptq_w4g64_sym", "compressed-tensors"),
        ("gptq_w4g64_sym", "awq"),
        ("gptq_w4g32_asym_v1", "gptq"),
        ("gptq_w4g32_asym_v2", "awq"),
        ("awq_gemm_w4g64", "gptq"),
        ("awq_gemm_w4g64", "compressed-tensors"),
        ("autoround_w4g64_sym", "compressed-tensors"),
        ("bnb_nf4_dq", "bitsandbytes"),
        ("torchao_int8wo", "compressed-tensors"),
    ],
)
def test_conversion_keeps_every_value_where_the_grids_agree(name, format, tmp_path):
    params, _ = jq.io.load_hf(MODELS / name)
    jq.io.save_hf(tmp_path / "out", params, format=format)
    again, info = jq.io.load_hf(tmp_path / "out")
    assert info.config["quant_method"] == format
    before, after = values(params), values(again)
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)


@pytest.mark.parametrize(
    "name, format, rule",
    [
        ("gptq_w4g64_actorder", "awq", "no reordered columns"),
        ("gptq_w4g64_actorder", "compressed-tensors", "no longer reads reordered columns"),
        ("gptq_w3g64_sym", "awq", "not on the format's grid"),
        ("bnb_nf4", "gptq", "not on the format's grid"),
        ("gptq_w4g64_sym", "bitsandbytes", "holds nf4 and fp4"),
        ("hqq_w4g64", "gptq", "zero points must be integers"),
        ("quanto_int4", "compressed-tensors", "zero points must be integers|groups along in"),
        ("ct_nvfp4", "compressed-tensors", "not on the format's grid"),
    ],
)
def test_conversion_is_refused_where_they_do_not(name, format, rule, tmp_path):
    params = jq.io.load_model(MODELS / name, activations="float").params
    with pytest.raises(QuantError, match=rule) as error:
        jq.io.save_hf(tmp_path / "out", params, format=format)
    assert "_proj.weight" in str(error.value)
    assert not list(tmp_path.iterdir())


# -- weights of our own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "qtype, fields, format",
    [
        ("int4", {"group_size": 32}, "compressed-tensors"),
        ("int8", {}, "compressed-tensors"),
        ("uint4", {"group_size": 32, "symmetric": False}, "compressed-tensors"),
        ("int3", {"group_size": 32}, "compressed-tensors"),
        ("float8_e4m3fn", {"scale_dtype": None}, "compressed-tensors"),
        ("float8_e4m3fn", {"scale_dtype": None, "granularity": "per_tensor"}, "compressed-tensors"),
        ("mxfp4", {}, "compressed-tensors"),
        ("int4", {"group_size": 32}, "gptq"),
        ("int2", {"group_size": 32}, "gptq"),
        ("uint4", {"group_size": 32, "symmetric": False}, "gptq"),
        ("uint8", {"symmetric": False}, "gptq"),
        ("int3", {}, "gptq"),
        ("int8", {}, "gptq"),
        ("int4", {"group_size": 32}, "awq"),
        ("uint4", {"group_size": 32, "symmetric": False}, "awq"),
        ("nf4", {"group_size": 32, "scale_dtype": None}, "bitsandbytes"),
        ("fp4", {"group_size": 64, "scale_dtype": None}, "bitsandbytes"),
        ("int4", {"group_size": 64}, "mlx"),
        ("int3", {"group_size": 32, "scale_dtype": "bfloat16"}, "mlx"),
        ("int8", {"group_size": 32}, "mlx"),
        ("mxfp4", {}, "mlx"),
    ],
)
def test_what_we_quantize_is_read_to_the_same_values(qtype, fields, format, tmp_path):
    params = {"a.weight": quantized(qtype, **fields), "a.bias": weight()[0], "norm.weight": jnp.ones(64)}
    jq.io.save_hf(tmp_path / "out", params, format=format)
    again, _ = jq.io.load_hf(tmp_path / "out")
    assert again.keys() == params.keys()
    got, expected = again["a.weight"], params["a.weight"]
    assert got.shape == expected.shape
    # Some formats leave the dtype of the result to the scales: the values before that rounding must agree.
    np.testing.assert_array_equal(got.dequantize(jnp.float32), expected.dequantize(jnp.float32))
    assert_same(again["a.bias"], params["a.bias"])


@pytest.mark.parametrize("shape", [(64, 2048), (67, 320)])
def test_double_quantization_keeps_its_groups_or_is_refused(tmp_path, shape):
    twice = functools.partial(jq.ptq.double_quantized, spec=present(jq.recipes.nf4(64).weight), reduce_axes=(-1,))
    q = jax.jit(twice)(weight(*shape))
    jq.io.save_hf(tmp_path / "out", {"a.weight": q}, format="bitsandbytes")
    found = jq.io.load_hf(tmp_path / "out")[0]["a.weight"]
    assert found.scale.qtype == "dynamic8"
    np.testing.assert_array_equal(found.dequantize(), q.dequantize())
    other = jax.jit(functools.partial(twice, group_size=128))(weight(64, 2048))
    with pytest.raises(QuantError, match="quantized scales have groups of 256"):
        jq.io.save_hf(tmp_path / "other", {"a.weight": other}, format="bitsandbytes")


def test_shards_have_an_index(tmp_path):
    params = {f"{i}.weight": quantized("int8", weight(seed=i)) for i in range(4)}
    jq.io.save_hf(tmp_path / "out", params, shard_bytes=9000)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    assert names == sorted(["config.json", "model.safetensors.index.json", *shards])
    again, _ = jq.io.load_hf(tmp_path / "out")
    for name, leaf in params.items():
        np.testing.assert_array_equal(again[name].dequantize(), leaf.dequantize(jnp.float16).astype(jnp.float32))


def test_weights_of_several_kinds_are_groups_of_compressed_tensors(tmp_path):
    params = {"a.weight": quantized("int8"), "b.weight": quantized("int4", group_size=32), "c.weight": weight()}
    jq.io.save_hf(tmp_path / "out", params, config={"model_type": "x"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "x"
    groups = config["quantization_config"]["config_groups"]
    assert [g["targets"] for g in groups.values()] == [["re:^a$"], ["re:^b$"]]
    assert config["quantization_config"]["ignore"] == ["c"]
    again, _ = jq.io.load_hf(tmp_path / "out")
    assert {name: getattr(leaf, "qtype", None) for name, leaf in again.items()} == {
        "a.weight": "int8", "b.weight": "int4", "c.weight": None
    }  # fmt: skip


CODES, ONES = np.zeros((64, 64), np.uint8), np.ones((64, 1), np.float32)


@pytest.mark.parametrize(
    "params, fields, rule",
    [
        (lambda: {"a.weight": weight()}, {}, "no quantized weight"),
        (lambda: {"a.kernel": quantized("int8")}, {}, "named <module>.weight"),
        (lambda: {"a.weight": quantized("int8"), "b": "text"}, {}, "not an array"),
        (lambda: {"a.weight": quantized("int8").store((-2,))}, {}, r"must be \[out, in\]"),
        (lambda: {"a.weight": quantized("int8")}, {"format": "other"}, "unknown format"),
        (
            lambda: {"a.weight": quantized("int8")},
            {"format": "gptq", "act": QuantSpec("int8")},
            "does not describe activations",
        ),
        (lambda: {"a.weight": quantized("int8")}, {"act": QuantSpec("int4")}, "activations are int8 or fp8"),
        (lambda: {"a.weight": quantized("int4")}, {"act": QuantSpec("int8")}, "quantized like the weight"),
        (
            lambda: {"a.weight": quantized("int8"), "a.input_scale": jnp.ones(())},
            {},
            "at a.input_scale: these tensors describe activations",
        ),
        (
            lambda: {"a.weight": quantized("int8")},
            {"act": QuantSpec("int8", calibration=jq.observers.MSE())},
            "with the range of the largest magnitude",
        ),
        (lambda: {"a.weight": quantized("int4", scale_dtype=None)}, {"format": "gptq"}, "must be a float16 number"),
        (lambda: {"a.weight": quantized("int4", weight(48, 64))}, {"format": "gptq"}, "multiples of 32"),
        (lambda: {"a.weight": quantized("int4", weight(48, 64))}, {"format": "awq"}, "multiples of 32"),
        (lambda: {"a.weight": quantized("nf4", group_size=16)}, {"format": "bitsandbytes"}, "one of a few sizes"),
        (
            lambda: {"a.weight": quantized("nf4", group_size=64, scale_dtype=None).replace(dtype=np.dtype("float64"))},
            {"format": "bitsandbytes"},
            "a weight is computed in.*Quantize a weight of float16, bfloat16, float32",
        ),
        (
            lambda: {"a.weight": quantized("int4", weight(64, 96))},
            {"format": "mlx"},
            "the groups of the format are others",
        ),
        (lambda: {"a.weight": quantized("nvfp4")}, {"format": "mlx"}, "no scale of the whole weight"),
        (
            lambda: {"a.weight": quantized("uint4", group_size=32, symmetric=False)},
            {"format": "mlx"},
            "zero points times scales must be numbers of the scales' dtype",
        ),
        (
            lambda: {"a.weight": quantized("int4"), "b.weight": quantized("int8")},
            {"format": "gptq"},
            "one number of bits",
        ),
        (
            lambda: {"a.weight": quantized("int4", group_size=32), "b.weight": quantized("int4", group_size=16)},
            {"format": "awq"},
            "one group size",
        ),
        (
            lambda: {"a.weight": quantized("nf4", group_size=32), "b.weight": quantized("fp4", group_size=32)},
            {"format": "bitsandbytes"},
            "one number type",
        ),
        (
            lambda: {
                "a.weight": from_codes(
                    jnp.asarray(CODES), jnp.ones((64, 1)), jnp.ones((64, 1)), qtype="uint4", dtype="float32"
                )
            },
            {"format": "gptq"},
            "zero points must be integers",
        ),
    ],
)
def test_refusals_come_before_anything_is_written(params, fields, rule, tmp_path):
    with pytest.raises(QuantError, match=rule):
        jq.io.save_hf(tmp_path / "out", params(), **fields)
    assert not list(tmp_path.iterdir())


def test_places_that_are_taken_or_missing(tmp_path):
    params = {"a.weight": quantized("int8")}
    with pytest.raises(QuantError, match="does not exist"):
        jq.io.save_hf(tmp_path / "no" / "out", params)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(QuantError, match="destination exists"):
        jq.io.save_hf(tmp_path / "out", params)
    (tmp_path / "out" / "x").unlink()
    jq.io.save_hf(tmp_path / "out", params)  # an empty directory will do
    assert not (tmp_path / "out.partial").exists()


# -- the original libraries --------------------------------------------------------------------------------------------


def test_compressed_tensors_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    assert library.__version__
    for i, (qtype, fields) in enumerate(
        [("int4", {"group_size": 32}), ("int8", {}), ("uint4", {"group_size": 32, "symmetric": False}), ("int3", {})]
    ):
        q = quantized(qtype, scale_dtype="float32", **fields)
        jq.io.save_hf(tmp_path / str(i), {"a.weight": q})
        config = json.loads((tmp_path / str(i) / "config.json").read_text())["quantization_config"]
        scheme = QuantizationScheme(**config["config_groups"]["group_0"])
        file = Checkpoint(tmp_path / str(i))
        state = {name.removeprefix("a."): torch.from_numpy(np.array(file.array(name))) for name in file.tensors}
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        got = compressor.decompress(state, scheme)["weight"]
        np.testing.assert_array_equal(present(got).float().numpy(), np.asarray(q.dequantize()))


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_reads_what_we_write(double, tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("bitsandbytes")
    q = quantized("nf4", group_size=64, scale_dtype=None)
    if double:
        q = jq.ptq.double_quantized(weight(64, 512), present(jq.recipes.nf4(64).weight), reduce_axes=(-1,))
    jq.io.save_hf(tmp_path / "out", {"a.weight": q}, format="bitsandbytes")
    file = Checkpoint(tmp_path / "out")
    state = {name.removeprefix("a."): torch.from_numpy(np.array(file.array(name))) for name in file.tensors}
    codes = state.pop("weight")
    known = library.functional.QuantState.from_dict(state, device="cpu")
    got = library.functional.dequantize_4bit(codes, known)
    np.testing.assert_array_equal(got.numpy(), np.asarray(q.dequantize()))


@pytest.mark.parametrize(
    "qtype, fields",
    [
        ("int4", {"group_size": 32}),
        ("int8", {}),
        ("uint4", {"group_size": 32, "symmetric": False}),
        ("uint2", {"group_size": 64, "symmetric": False}),
        ("permuted", {}),
    ],
)
def test_gptq_is_read_by_the_arithmetic_of_its_kernels_in_torch(qtype, fields, tmp_path):
    """Shifts of whole words and scales taken by ``g_idx``, as the PyTorch kernels of GPTQModel do it."""
    torch = pytest.importorskip("torch")
    q = quantized(qtype, **fields) if qtype != "permuted" else act_order()
    jq.io.save_hf(tmp_path / "out", {"a.weight": q}, format="gptq")
    file = Checkpoint(tmp_path / "out")
    t = {name.removeprefix("a."): torch.from_numpy(np.array(file.array(name))) for name in file.tensors}
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    bits, mask = config["bits"], (1 << config["bits"]) - 1
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    zeros = (torch.bitwise_right_shift(t["qzeros"][:, :, None], shifts) & mask).reshape(t["scales"].shape)
    zeros = zeros + (config["checkpoint_format"] == "gptq")
    codes = (torch.bitwise_right_shift(t["qweight"][:, None], shifts[:, None]) & mask).reshape(-1, q.shape[0])
    group = t["g_idx"].long()
    got = t["scales"].float()[group] * (codes - zeros[group])
    np.testing.assert_array_equal(got.T.numpy(), np.asarray(q.dequantize(jnp.float32)))


def act_order():
    params, _ = jq.io.load_hf(MODELS / "gptq_w4g64_actorder")
    return next(leaf for leaf in params.values() if isinstance(leaf, jq.QTensor) and leaf.permutation is not None)


def test_awq_is_read_by_the_arithmetic_of_its_kernels_in_torch(tmp_path):
    torch = pytest.importorskip("torch")
    q = quantized("uint4", group_size=32, symmetric=False)
    jq.io.save_hf(tmp_path / "out", {"a.weight": q}, format="awq")
    file = Checkpoint(tmp_path / "out")
    t = {name.removeprefix("a."): torch.from_numpy(np.array(file.array(name))) for name in file.tensors}
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32)  # of columns 0 to 7 in a word

    def nibbles(words):
        return (torch.bitwise_right_shift(words[:, :, None], shifts) & 15).reshape(len(words), -1)

    codes, zeros, scales = nibbles(t["qweight"]), nibbles(t["qzeros"]), t["scales"].float()
    got = (codes - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)
    np.testing.assert_array_equal(got.T.numpy(), np.asarray(q.dequantize(jnp.float32)))
