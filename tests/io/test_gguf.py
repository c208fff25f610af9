"""GGUF: against blocks and a file that gguf 0.19.0 wrote, there and back, and files that are broken."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from io_files import assert_same
from narrowed import present, untyped

import jaxquant as jq
from jaxquant import QuantError
from jaxquant.io.gguf.container import GGUFFile, TensorInfo, write_gguf
from jaxquant.io.gguf.names import ARCHITECTURES, interleave, separate, to_gguf, to_hugging_face
from jaxquant.io.gguf.types import BY_ID, BY_NAME
from jaxquant.io.safetensors import SafetensorsFile

pytestmark = pytest.mark.every

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = GOLDEN / "models" / "gguf_Q4_0"
REFUSED = sorted(kind.name for kind in BY_ID.values() if kind.refused)
BLOCKS = sorted(kind.name for kind in BY_ID.values() if kind.split)
ARCHITECTURE = {"general.architecture": "test"}


def unit(name):
    """(blocks, values) that the reference wrote and read."""
    file = SafetensorsFile(GOLDEN / f"gguf_{name}.safetensors")
    return np.array(file.array("blocks")), np.array(file.array("ref_dequant"))


def write_blocks(path, name, blocks, shape, metadata=ARCHITECTURE, tensor="w"):
    info = TensorInfo(BY_NAME[name], tuple(shape))
    write_gguf(path, metadata, {tensor: info}, lambda _: blocks.reshape(info.stored_shape))


# -- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BLOCKS, "BF16"])
def test_values_are_those_of_the_reference_to_the_last_bit(name, tmp_path):
    blocks, values = unit(name)
    write_blocks(tmp_path / "a.gguf", name, blocks, values.shape)
    params, info = jq.io.load_gguf(tmp_path / "a.gguf")
    got = params["w"] if name == "BF16" else params["w"].dequantize()
    assert info.types == {"w": name}
    assert got.shape == values.shape
    np.testing.assert_array_equal(np.asarray(got, np.float32), values)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_loaded_is_written_again_byte_for_byte(name, tmp_path):
    blocks, values = unit(name)
    write_blocks(tmp_path / "a.gguf", name, blocks, values.shape)
    params, info = jq.io.load_gguf(tmp_path / "a.gguf")
    jq.io.save_gguf(tmp_path / "b.gguf", params, metadata=info.metadata, types=info.types)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_loaded_tensor_takes_no_more_memory_than_the_file_and_a_little(name, tmp_path):
    """Codes at their own width and scales as the file has them; offsets of one level are float32."""
    blocks, values = unit(name)
    write_blocks(tmp_path / "a.gguf", name, blocks, values.shape)
    q = jq.io.load_gguf(tmp_path / "a.gguf")[0]["w"]
    count = blocks.size // BY_NAME[name].nbytes
    extra = {"NVFP4": 4, "TQ1_0": 12 * count, "Q4_1": 2 * count, "Q5_1": 2 * count}.get(name, 0)
    assert q.nbytes == blocks.size + extra


def test_a_whole_model_has_the_reference_weights_under_hugging_face_names(tmp_path):
    reference = json.loads((MODEL / "ref.json").read_text())["dequant_sha256"]
    params, info = jq.io.load_gguf(MODEL / "model.gguf", names="hf")
    for module, entry in reference.items():
        values = np.asarray(jq.dequantize_params(params[f"{module}.weight"]), np.float32)
        assert list(values.shape) == entry["shape"]
        # The reference has lost the sign of zeros.
        assert hashlib.sha256((values + 0.0).tobytes()).hexdigest() == entry["sha256"], module
    assert info.architecture == "llama"
    assert info.types["lm_head.weight"] == "Q8_0"
    assert info.metadata["llama.attention.head_count"] == np.uint32(4)
    assert sorted(info.reordered) == [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "kq"]


@pytest.mark.parametrize("names", ["gguf", "hf"])
def test_a_whole_model_is_written_again_byte_for_byte(names, tmp_path):
    params, info = jq.io.load_gguf(MODEL / "model.gguf", names=names)
    jq.io.save_gguf(tmp_path / "model.gguf", params, metadata=info.metadata, names=names)
    assert (tmp_path / "model.gguf").read_bytes() == (MODEL / "model.gguf").read_bytes()


def test_the_reference_library_reads_what_we_write(tmp_path):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(4, 256)) * np.exp(rng.normal(size=(4, 1)) * 3), jnp.float32)
    params: dict[str, Any] = {f"{q}.weight": quantized(w, q) for q in ("int8", "int4", "int5", "iq4_nl", "mxfp4")}
    params["b.bias"] = w[0].astype(jnp.bfloat16)
    jq.io.save_gguf(tmp_path / "a.gguf", params, metadata={"general.architecture": "llama", "llama.x": np.float32(2)})
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["llama.x"].contents() == 2
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert found.keys() == params.keys()
    for name, leaf in params.items():
        np.testing.assert_array_equal(found[name], np.asarray(jq.dequantize_params(leaf), np.float32))


# -- laws --------------------------------------------------------------------------------------------------------------


@given(st.sampled_from([name for name in BLOCKS if name != "TQ1_0"]), st.integers(0, 2**32 - 1))
def test_any_block_comes_back(name, seed):
    kind = BY_NAME[name]
    raw = np.random.default_rng(seed).integers(0, 256, (3, 2, kind.nbytes), np.uint8)
    assert kind.split is not None
    assert kind.join is not None
    if name == "NVFP4":
        raw[..., :4] &= 127  # its scales have no sign
    parts = kind.split(raw)
    assert parts.codes.shape == (3, 2, kind.elements)
    np.testing.assert_array_equal(kind.join(parts), raw)


@given(st.integers(0, 2**32 - 1))
def test_any_ternary_block_comes_back(seed):
    kind = BY_NAME["TQ1_0"]
    codes = np.random.default_rng(seed).integers(-1, 2, (2, 256), np.int8)
    assert kind.split is not None
    assert kind.join is not None
    raw = kind.join(kind.split(np.zeros((2, kind.nbytes), np.uint8))._replace(codes=codes))
    np.testing.assert_array_equal(kind.split(raw).codes, codes)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_row_orders_are_inverse(heads, half, columns):
    rows = np.arange(heads * half * 2 * columns).reshape(-1, columns)
    np.testing.assert_array_equal(separate(interleave(rows, heads), heads), rows)
    first = interleave(rows, heads)[: 2 * half]
    np.testing.assert_array_equal(first[0::2], rows[:half])  # the first half of a head: the even rows
    np.testing.assert_array_equal(first[1::2], rows[half : 2 * half])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "name", ["token_embd.weight", "output_norm.weight", "output.weight", "blk.11.attn_q.bias", "blk.0.ffn_down.weight"]
)
def test_names_are_inverse(name, architecture):
    metadata = {"general.architecture": architecture}
    assert to_gguf(present(to_hugging_face(name, metadata)), metadata) == name


@pytest.mark.parametrize(
    "architecture, name, there",
    [
        ("llama", "blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("qwen3", "blk.3.attn_k_norm.weight", "model.layers.3.self_attn.k_norm.weight"),
        ("gemma", "blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("gemma2", "blk.0.ffn_norm.weight", "model.layers.0.pre_feedforward_layernorm.weight"),
        ("gemma3", "blk.0.post_attention_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("olmo2", "blk.0.post_ffw_norm.weight", "model.layers.0.post_feedforward_layernorm.weight"),
        ("olmo2", "blk.0.ffn_norm.weight", None),
        ("phi2", "output_norm.bias", "model.final_layernorm.bias"),
        ("phi3", "blk.1.attn_qkv.weight", "model.layers.1.self_attn.qkv_proj.weight"),
        ("starcoder2", "blk.1.ffn_up.bias", "model.layers.1.mlp.c_fc.bias"),
        ("llama", "rope_freqs.weight", None),
        ("mamba", "token_embd.weight", None),
    ],
)
def test_what_tensors_are_called(architecture, name, there):
    assert to_hugging_face(name, {"general.architecture": architecture}) == there


def test_the_names_are_those_of_gguf():
    gguf = pytest.importorskip("gguf")
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for architecture in ARCHITECTURES:
        table = gguf.get_tensor_name_map(numbers[architecture], 2)
        for stem in (stem.format(bid=1) for stem in gguf.TENSOR_NAMES.values()):
            ours = to_hugging_face(f"{stem}.weight", {"general.architecture": architecture})
            if ours is not None and (known := table.get_name(ours.removesuffix(".weight"))) is not None:
                assert known == stem, (architecture, ours)


HEADS = {"attention.head_count": np.uint32(4), "attention.head_count_kv": np.uint32(2)}


@pytest.mark.parametrize(
    "architecture, interleaved", [("llama", True), ("qwen2", False), ("olmo", True), ("phi2", False)]
)
def test_only_some_architectures_interleave(architecture, interleaved, tmp_path):
    metadata = {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in HEADS.items()}
    rows = np.arange(32 * 3, dtype=np.float32).reshape(32, 3)
    names = {f"model.layers.0.self_attn.{x}_proj.weight": rows for x in "qkv"}
    jq.io.save_gguf(tmp_path / "a.gguf", names, metadata=metadata, names="hf")
    file = GGUFFile(tmp_path / "a.gguf")
    stored = {x: np.ascontiguousarray(file.blocks(f"blk.0.attn_{x}.weight")).view("<f4").reshape(32, 3) for x in "qkv"}
    for x, heads in (("q", 4), ("k", 2)):
        np.testing.assert_array_equal(stored[x], interleave(rows, heads) if interleaved else rows)
    np.testing.assert_array_equal(stored["v"], rows)
    params, info = jq.io.load_gguf(tmp_path / "a.gguf", names="hf")
    assert len(info.reordered) == (2 if interleaved else 0)
    for name in names:
        np.testing.assert_array_equal(params[name], rows)


def test_norms_of_gemma_are_without_the_1(tmp_path):
    metadata = {"general.architecture": "gemma2"}
    norm, bias = np.array([0.5, -0.25, 3.0], np.float32), np.ones(3, np.float32)
    names = {"model.norm.weight": norm, "model.layers.0.self_attn.q_proj.bias": bias}
    jq.io.save_gguf(tmp_path / "a.gguf", names, metadata=metadata, names="hf")
    stored = GGUFFile(tmp_path / "a.gguf").blocks("output_norm.weight")
    np.testing.assert_array_equal(np.ascontiguousarray(stored).view("<f4").reshape(3), norm + 1)
    params, _ = jq.io.load_gguf(tmp_path / "a.gguf")
    np.testing.assert_array_equal(params["output_norm.weight"], norm)
    np.testing.assert_array_equal(params["blk.0.attn_q.bias"], bias)


def test_names_of_unknown_architectures_are_refused(tmp_path):
    metadata = {"general.architecture": "mamba"}
    with pytest.raises(QuantError, match="names of the architecture are not known; got architecture='mamba'"):
        jq.io.save_gguf(tmp_path / "a.gguf", {"x": np.ones(3, np.float32)}, metadata=metadata, names="hf")
    jq.io.save_gguf(tmp_path / "a.gguf", {"x": np.ones(3, np.float32)}, metadata=metadata)
    with pytest.raises(QuantError, match="names of the architecture are not known; got architecture='mamba'"):
        jq.io.load_gguf(tmp_path / "a.gguf", names="hf")


def test_leaves_are_put_where_they_belong():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", None))
    name = "blk.0.attn_q.weight"
    plain, _ = jq.io.load_gguf(MODEL / "model.gguf")
    params, _ = jq.io.load_gguf(MODEL / "model.gguf", sharding={name: rows})
    assert params[name].codes.sharding.spec == params[name].scale.sharding.spec == rows.spec
    np.testing.assert_array_equal(params[name].codes, plain[name].codes)
    assert len(params["output_norm.weight"].sharding.device_set) == 1
    with pytest.raises(QuantError, match="load_gguf: not a sharding"):
        untyped.io.load_gguf(MODEL / "model.gguf", sharding=3)


# -- writing -----------------------------------------------------------------------------------------------------------


def quantized(w, qtype, **fields):
    if qtype in ("mxfp4", "nvfp4"):
        return jq.quantize(w, jq.QuantSpec(qtype), reduce_axes=(-1,))
    spec = {"granularity": "per_group", "group_size": 32, "scale_dtype": "float16"} | fields
    return jq.quantize(w, jq.QuantSpec(qtype, **spec), reduce_axes=(-1,))


def weight(shape=(4, 256)):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)) * 2), jnp.float32)


@pytest.mark.parametrize(
    "qtype, kind",
    [("int8", "Q8_0"), ("int4", "Q4_0"), ("int5", "Q5_0"), ("iq4_nl", "IQ4_NL"), ("mxfp4", "MXFP4")],
)
def test_quantized_weights_keep_codes_and_values(qtype, kind, tmp_path):
    q = quantized(weight((2, 3, 64)), qtype)
    jq.io.save_gguf(tmp_path / "a.gguf", {"w": q}, metadata=ARCHITECTURE)
    params, info = jq.io.load_gguf(tmp_path / "a.gguf")
    assert info.types == {"w": kind}
    assert_same(params["w"], q)


def test_larger_groups_repeat_their_scale(tmp_path):
    w = weight()
    for fields in ({"group_size": 64}, {"granularity": "per_channel", "group_size": None}):
        q = quantized(w, "int4", **fields)
        jq.io.save_gguf(tmp_path / "a.gguf", {"w": q}, metadata=ARCHITECTURE)
        got = jq.io.load_gguf(tmp_path / "a.gguf")[0]["w"]
        np.testing.assert_array_equal(got.dequantize(), q.dequantize())
        np.testing.assert_array_equal(got.logical_codes(), q.logical_codes())


@pytest.mark.parametrize("qtype", ["uint4", "uint8"])
def test_a_zero_point_in_the_middle_is_the_signed_type(qtype, tmp_path):
    w, bits = weight(), int(qtype[4:])
    signed = quantized(w, f"int{bits}")
    codes = (signed.logical_codes().astype(jnp.int16) + 2 ** (bits - 1)).astype(jnp.uint8)
    zeros = jnp.full(signed.scale.shape, 2 ** (bits - 1), jnp.uint8)
    unsigned = jq.core.qtensor.from_codes(codes, signed.scale, zeros, qtype=qtype, dtype=jnp.float32)
    jq.io.save_gguf(tmp_path / "a.gguf", {"w": unsigned}, metadata=ARCHITECTURE)
    assert_same(jq.io.load_gguf(tmp_path / "a.gguf")[0]["w"], signed)


def test_ternary_codes_of_either_type(tmp_path):
    spec = jq.QuantSpec("int2", granularity="per_group", group_size=256, narrow_range=True, scale_dtype="float16")
    q = jq.quantize(weight((2, 512)), spec, reduce_axes=(-1,))
    for kind in ("TQ1_0", "TQ2_0"):
        jq.io.save_gguf(tmp_path / "a.gguf", {"w": q}, metadata=ARCHITECTURE, types={"w": kind})
        params, info = jq.io.load_gguf(tmp_path / "a.gguf")
        assert info.types == {"w": kind}
        assert_same(params["w"], q)


def test_plain_arrays_of_every_dtype(tmp_path):
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.int16, np.int32, np.int64, np.float64)
    params: dict[str, Any] = {np.dtype(d).name: np.arange(6).reshape(2, 3).astype(d) for d in dtypes} | {
        "one": np.float32(3)
    }
    jq.io.save_gguf(tmp_path / "a.gguf", params, metadata=ARCHITECTURE)
    loaded = jq.io.load_gguf(tmp_path / "a.gguf")[0]
    assert loaded.keys() == params.keys()
    for name in params:
        assert_same(loaded[name], params[name])


NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "u8", "i8", "f8")


def test_metadata_of_every_kind(tmp_path):
    metadata = ARCHITECTURE | {"tokens": ["a", "\udcff", ""], "flag": True, "none": np.zeros(0, np.uint8)}
    metadata |= {str(i): np.arange(3).astype(d) for i, d in enumerate(NUMBERS)}
    metadata |= {f"one {d}": np.dtype(d).type(1) for d in NUMBERS}
    jq.io.save_gguf(tmp_path / "a.gguf", {}, metadata=metadata)
    found = jq.io.load_gguf(tmp_path / "a.gguf")[1].metadata
    assert found.keys() == metadata.keys()
    for key, value in metadata.items():
        assert type(found[key]) is (np.bool_ if value is True else type(value))
        np.testing.assert_array_equal(found[key], value)


def test_other_alignments(tmp_path):
    metadata = ARCHITECTURE | {"general.alignment": np.uint32(64)}
    params = {"a": jnp.ones(3), "b": jnp.ones(5)}
    jq.io.save_gguf(tmp_path / "a.gguf", params, metadata=metadata)
    assert (tmp_path / "a.gguf").stat().st_size % 64 == 0
    assert_same(jq.io.load_gguf(tmp_path / "a.gguf")[0], params)


W = weight((4, 64))


@pytest.mark.parametrize(
    "leaf, rule",
    [
        (lambda: quantized(W, "int4", scale_dtype="float32"), "each scale must be a float16 number"),
        (lambda: quantized(W, "int4", group_size=16), "a group of Q4_0 has 32 elements"),
        (lambda: quantized(weight((4, 48)), "int8", group_size=16), "whole blocks of 32"),
        (lambda: quantized(W, "int3"), "without quantizing again"),
        (lambda: quantized(W, "uint4", symmetric=False), "without quantizing again"),
        (lambda: quantized(W, "nvfp4"), "no scale of the whole tensor"),
        (lambda: jnp.ones(3, jnp.complex64), "not an array"),
        (lambda: jnp.ones((1, 1, 1, 1, 1)), "at most four axes"),
        (lambda: "text", "not an array"),
    ],
)
def test_what_fits_no_type_is_refused_by_name_before_anything_is_written(leaf, rule, tmp_path):
    with pytest.raises(QuantError, match=rule) as error:
        jq.io.save_gguf(tmp_path / "a.gguf", {"ok": jnp.ones(2), "layer.w": leaf()}, metadata=ARCHITECTURE)
    assert "save_gguf at layer.w" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, rule",
    [
        ({"metadata": {}}, "general.architecture"),
        ({"metadata": ARCHITECTURE | {"n": 3}}, "must have a width"),
        ({"metadata": ARCHITECTURE, "names": "other"}, "names must be"),
        ({"metadata": ARCHITECTURE, "types": {"v": "F32"}}, "not there"),
        ({"metadata": ARCHITECTURE, "types": {"w": "F99"}}, "unknown type"),
        ({"metadata": ARCHITECTURE, "types": {"w": "Q4_0"}}, "the array is F32"),
        ({"metadata": {"general.architecture": "llama"}, "params": {"blk.0.attn_q.weight": jnp.ones((4, 4))}}, "heads"),
    ],
)
def test_bad_calls(arguments, rule, tmp_path):
    with pytest.raises(QuantError, match=rule):
        jq.io.save_gguf(tmp_path / "a.gguf", **({"params": {"w": np.ones(3, np.float32)}} | arguments))
    assert not list(tmp_path.iterdir())


# -- broken files ------------------------------------------------------------------------------------------------------


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def tensor(name="w", sizes=(8,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def image(tensors=(), entries=(), data=b"", *, count=None, keys=None, version=3, magic=b"GGUF"):
    head = magic + struct.pack("<IQQ", version, len(tensors) if count is None else count, keys or len(entries))
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


BROKEN = {
    "empty": (b"", "ends before"),
    "not gguf": (b"GGML" + bytes(40), "must begin with GGUF"),
    "version 1": (image(version=1), "only versions 2 and 3"),
    "big-endian": (image(version=3 << 24), "little-endian"),
    "tensors that are not there": (image(count=1 << 60), "ends before"),
    "entries that are not there": (image(keys=1 << 60), "ends before"),
    "a string longer than the file": (image(entries=[struct.pack("<Q", 1 << 63) + b"abc"]), "ends before a key"),
    "an array longer than the file": (
        image(entries=[string("k") + struct.pack("<IIQ", 9, 10, 1 << 60)]),
        "ends before k",
    ),
    "an unknown kind": (image(entries=[string("k") + struct.pack("<I", 13)]), "unknown kind of metadata"),
    "arrays in arrays": (image(entries=[string("k") + struct.pack("<IIQ", 9, 9, 1)]), "unknown kind of metadata"),
    "a boolean of 2": (image(entries=[string("k") + struct.pack("<IB", 7, 2)]), "must be 0 or 1"),
    "a key twice": (image(entries=[string("k") + struct.pack("<IB", 0, 2)] * 2), "occurs twice"),
    "alignment 0": (image(entries=[string("general.alignment") + struct.pack("<II", 4, 0)]), "power of two"),
    "alignment 3": (image(entries=[string("general.alignment") + struct.pack("<II", 4, 3)]), "power of two"),
    "a text as alignment": (
        image(entries=[string("general.alignment") + struct.pack("<I", 8) + string("32")]),
        "power of two",
    ),
    "a tensor twice": (image([tensor(), tensor()], data=bytes(64)), "occurs twice"),
    "five axes": (image([tensor(sizes=(1, 1, 1, 1, 1))], data=bytes(32)), "at most 4 axes"),
    "an absurd shape": (image([tensor(sizes=(1 << 40, 1 << 40))], data=bytes(32)), "not the shape"),
    "an absurd empty shape": (image([tensor(sizes=(1 << 40, 1 << 40, 0))], data=bytes(32)), "not the shape"),
    "an unknown type": (image([tensor(kind=99)], data=bytes(32)), "unknown type of tensor"),
    "half a block": (image([tensor(sizes=(40,), kind=2)], data=bytes(64)), "whole blocks of 32"),
    "too little data": (image([tensor(sizes=(9,))], data=bytes(32)), "reaches beyond the file"),
    "too much data": (image([tensor()], data=bytes(65)), "belongs to no tensor"),
    "an overlap": (image([tensor("a"), tensor("b", offset=0)], data=bytes(64)), "without holes or overlaps"),
    "a hole": (image([tensor("a"), tensor("b", offset=64)], data=bytes(128)), "without holes or overlaps"),
    "an offset that lies": (image([tensor(offset=1 << 63)], data=bytes(32)), "without holes or overlaps"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_the_reason(case, tmp_path):
    content, rule = BROKEN[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(QuantError, match=rule) as error:
        jq.io.load_gguf(path)
    assert str(path) in str(error.value)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    q = quantized(weight((2, 32)), "int4")
    jq.io.save_gguf(path, {"w": q, "b": jnp.ones(8)}, metadata=ARCHITECTURE | {"tokens": ["a", "b"]})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(QuantError):
            GGUFFile(path)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_read(tmp_path_factory, changes):
    """No crash, no exception but ours, and no more memory than the file gives reason for."""
    content = bytearray(CHANGED)
    for at, byte in changes:
        content[at % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
    except QuantError:
        return
    assert sum(info.nbytes for info in file.tensors.values()) <= len(content)


def small_file():
    entries = [string("general.architecture") + struct.pack("<I", 8) + string("llama")]
    entries += [string("t") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b")]
    entries += [string("n") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3)]
    tensors = [tensor("a", (32, 2), 2), tensor("b", (8,), 0, 64), tensor("c", (256,), 14, 96)]
    return image(tensors, entries, bytes(36 + 28 + 32 + 210 + 14))


CHANGED = small_file()


@pytest.mark.parametrize("name", REFUSED)
def test_types_that_are_not_read_are_named_with_the_reason(name, tmp_path):
    kind = BY_NAME[name]
    write_blocks(tmp_path / "a.gguf", name, np.zeros(kind.nbytes, np.uint8), (kind.elements,), tensor="blk.0.w")
    with pytest.raises(QuantError, match=f"tensors of type {name} are not supported: ") as error:
        jq.io.load_gguf(tmp_path / "a.gguf")
    assert "blk.0.w" in str(error.value)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q6_K", "MXFP4", "NVFP4"])
def test_scales_that_are_not_finite_are_refused(name, tmp_path):
    kind = BY_NAME[name]
    write_blocks(tmp_path / "a.gguf", name, np.full(kind.nbytes, 255, np.uint8), (kind.elements,), tensor="blk.0.w")
    with pytest.raises(QuantError, match="scales must be finite") as error:
        jq.io.load_gguf(tmp_path / "a.gguf")
    assert "blk.0.w" in str(error.value)


@pytest.mark.parametrize("heads", [None, np.uint32(0), np.uint32(3), np.zeros(0, np.int32), "4"])
def test_interleaved_rows_need_their_heads(heads, tmp_path):
    metadata = {"general.architecture": "llama"} | ({} if heads is None else {"llama.attention.head_count": heads})
    write_blocks(tmp_path / "a.gguf", "F32", np.zeros(64, np.uint8), (4, 4), metadata, "blk.0.attn_q.weight")
    with pytest.raises(QuantError, match="heads of an even size"):
        jq.io.load_gguf(tmp_path / "a.gguf")


def test_bad_arguments(tmp_path):
    with pytest.raises(QuantError, match="names must be"):
        untyped.io.load_gguf(MODEL / "model.gguf", names="flax")
    with pytest.raises(OSError, match="nothing"):
        jq.io.load_gguf(tmp_path / "nothing")


def test_the_loaded_model_does_not_need_the_file(tmp_path):
    path = tmp_path / "a.gguf"
    jq.io.save_gguf(path, {"w": quantized(W, "int8"), "b": W}, metadata=ARCHITECTURE)
    params = jq.io.load_gguf(path)[0]
    before = [np.array(leaf) for leaf in (params["w"].codes, params["w"].scale, params["b"])]
    path.write_bytes(bytes(path.stat().st_size))
    after = [np.asarray(leaf) for leaf in (params["w"].codes, params["w"].scale, params["b"])]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


# -- what is loaded is a QTensor like any other ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_K", "Q2_K", "Q4_1", "IQ4_XS"])
def test_products_lookups_and_checkpoints_of_loaded_weights(name, tmp_path):
    blocks, _ = unit(name)
    per_row = blocks.size // BY_NAME[name].nbytes // 3
    blocks = blocks.reshape(-1)[: 3 * per_row * BY_NAME[name].nbytes]
    write_blocks(tmp_path / "a.gguf", name, blocks, (3, per_row * BY_NAME[name].elements))
    q = jq.io.load_gguf(tmp_path / "a.gguf")[0]["w"]
    x = np.random.default_rng(0).normal(size=(2, q.shape[1])).astype(np.float32)
    rows = np.array([2, 0])

    @jax.jit
    def used(q):
        return q.dequantize(), jq.ops.einsum("bk,nk->bn", x, q), jq.ops.take(q, rows, axis=0), q.store((-2,))

    w, got, taken, stored = used(q)
    w = np.asarray(w)
    np.testing.assert_allclose(
        got, np.einsum("bk,nk->bn", x, w.astype(np.float64)), rtol=1e-5, atol=1e-5 * np.abs(x).max() * np.abs(w).sum()
    )
    np.testing.assert_array_equal(taken, w[rows])
    np.testing.assert_array_equal(stored.dequantize(), w)
    jq.io.save(tmp_path / "a.safetensors", {"w": q})
    assert_same(jq.io.load(tmp_path / "a.safetensors")["w"], q)
