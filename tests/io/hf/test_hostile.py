"""Checkpoints that are damaged, contradict themselves, or mean harm: a clear error, and nothing else."""

import copy
import json
import re

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hf_cases import CASES
from hf_files import GOLDEN, checkpoint, of_model
from hypothesis import HealthCheck, given, settings

import jaxquant as jq
from jaxquant.core.qtypes import QTYPES

# Weights are what is read here, also of files that say how activations are quantized.
pytestmark = pytest.mark.filterwarnings("ignore:.*gives its weights alone")


def written(folder, case, change=None):
    """A case as a directory; ``change`` works on its tensors and configuration."""
    tensors, config, *metadata = CASES[case]
    tensors, config = dict(tensors), copy.deepcopy(config)
    if change is not None:
        change(tensors, config)
    return checkpoint(folder, tensors, config, metadata=metadata[0] if metadata else None)


@pytest.mark.parametrize("case", CASES)
def test_cases_are_sound(tmp_path, case):
    _, info = jq.io.load_hf(written(tmp_path, case))
    assert len(info.modules) == 1


@pytest.mark.parametrize("case", CASES)
def test_every_part_is_needed(tmp_path, case):
    """Without any one of its tensors a module is refused, by name, or the rest says the same."""
    optional = {"g_idx", "weight_g_idx", "weight_zero_point", "bias", "weight_format", "zero_point"}
    optional |= {
        "weight_scale" if case == "vptq" else "perm",
        "weight_bias",
        "perm",
        "input_activation_scale",
        "up_bias",
    }
    optional |= {"nbits", "axis", "group_size", "packing", "compute_dtype", "_weight_zero_point"}
    for name in CASES[case][0]:
        if name.rpartition(".")[2] in optional or name.endswith("res_centroids.weight"):
            continue
        folder = written(tmp_path / name, case, lambda t, c, name=name: t.pop(name))
        with pytest.raises(jq.QuantError, match=r"load_hf at .*: (a tensor of a|codes without|there must|the)"):
            jq.io.load_hf(folder)


FLOATS = (np.float16, np.float32, ml_dtypes.bfloat16)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_must_be_finite(tmp_path, case, bad):
    tensors = CASES[case][0]
    names = [n for n, a in tensors.items() if "scale" in n.lower() or "absmax" in n or n.endswith("SCB")]
    names = [n for n in names if tensors[n].dtype in FLOATS and not n.endswith("input_activation_scale")]
    for name in names:

        def spoil(tensors, config, name=name):
            array = np.array(tensors[name])
            array.reshape(-1)[0] = bad
            tensors[name] = array

        with pytest.raises(jq.QuantError, match=rf"{re.escape(name)}.*(finite|positive)"):
            jq.io.load_hf(written(tmp_path / name, case, spoil))


@pytest.mark.parametrize("case", [case for case in CASES if case != "torchao"])
def test_unknown_tensors_beside_a_weight(tmp_path, case):
    tensors = CASES[case][0]
    prefix = "m.experts.up" if case == "mxfp4" else "m"
    name = f"{prefix}.surprise" if case != "mxfp4" else f"{prefix}_surprise"
    folder = written(tmp_path, case, lambda t, c: t.update({name: np.ones(3, np.float32)}))
    with pytest.raises(
        jq.QuantError, match=rf"model.safetensors, '{name}': an unknown tensor beside a quantized weight"
    ):
        jq.io.load_hf(folder)
    assert name not in tensors


def test_empty_weights(tmp_path):
    def empty(tensors, config):
        tensors.update({"m.weight": np.zeros((0, 4), np.int8), "m.weight_scale": np.zeros((0, 1), np.float32)})

    with pytest.raises(
        jq.QuantError, match=r"'m.weight': a tensor of a quantized module has elements; got shape=\(0, 4\)"
    ):
        jq.io.load_hf(written(tmp_path, "ct int8", empty))


def test_what_fuzzing_found(tmp_path):
    """Bit planes that end within 32 codes, parameters that are no integers, groups larger than any file."""

    def planes(tensors, config):
        config["quantization_config"]["bits"] = 5
        tensors["m.qweight"], tensors["m.g_idx"] = np.zeros((10, 8), np.int32), np.zeros(64, np.int32)
        tensors["m.qzeros"], tensors["m.scales"] = np.zeros((1, 2), np.int32), np.ones((1, 8), np.float16)

    with pytest.raises(jq.QuantError, match="bit planes hold 32 codes at a time"):
        jq.io.load_hf(written(tmp_path / "a", "gptq", planes))
    with pytest.raises(jq.QuantError, match=r"m.nbits': the dtype must be bool or"):
        jq.io.load_hf(written(tmp_path / "b", "hqq", lambda t, c: t.update({"m.nbits": np.complex64(3)})))

    def wide(tensors, config):
        del tensors["m.g_idx"]
        tensors["m.qzeros"], tensors["m.scales"] = tensors["m.qzeros"][:1], tensors["m.scales"][:1]
        config["quantization_config"]["group_size"] = 1 << 70

    params, _ = jq.io.load_hf(written(tmp_path / "c", "gptq", wide))
    assert params["m.weight"].scale.shape[1] == 1


def test_codes_without_configuration(tmp_path):
    folder = checkpoint(tmp_path, {"m.weight": np.ones((4, 4), np.int8)})
    with pytest.raises(jq.QuantError, match=r"'m.weight': codes, and no configuration that says of which format"):
        jq.io.load_hf(folder)


def test_codes_without_scales(tmp_path):
    folder = written(tmp_path, "fp8", lambda t, c: t.update({"n.weight": t["m.weight"]}))
    with pytest.raises(jq.QuantError, match=r"'n.weight': codes without scales; got dtype='float8_e4m3fn'"):
        jq.io.load_hf(folder)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quant_method": "eetq"}, "the format 'eetq' is not read: its weights are interleaved"),
        ({"quant_method": "higgs"}, "the format 'higgs' is not read: its inputs are rotated"),
        ({"quant_method": "newest"}, "the format 'newest' is not read: it is not known"),
        ({"bits": 4}, "the quantization configuration has no quant_method, the key that names its format"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "the layout 'marlin' is that of one GPU kernel"),
        ({"quant_method": "awq", "version": "exllama"}, "the layout 'exllama' is that of one GPU kernel"),
        ({"quant_method": "awq", "bits": 3}, "AWQ has 4-bit codes only; got bits=3"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "the 2:4 sparse format 'marlin-24' was removed",
        ),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "its activations are rotated"),
        ({"quant_method": "fp8", "fmt": "e4m3fnuz"}, "the fp8 variant of AMD's older GPUs is not read"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "its weights are scaled by pre_quant_scale"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, config, message):
    folder = checkpoint(tmp_path, {"x": np.ones(2, np.float32)}, {"quantization_config": config})
    with pytest.raises(jq.QuantError, match=re.escape(message)):
        jq.io.load_hf(folder)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(jq.QuantError, match=r"there is no safetensors file.*never read"):
        jq.io.load_hf(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd.safetensors", "sub/x.safetensors", "model.safetensors.index.json", 3]
)
def test_indices_may_not_point_elsewhere(tmp_path, shard):
    folder = checkpoint(tmp_path / "a", {"x": np.ones(2, np.float32)})
    checkpoint(tmp_path, {"x": np.ones(2, np.float32)}, shards={"x": "other.safetensors"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(jq.QuantError, match="the index may name safetensors files of its own directory only"):
        jq.io.load_hf(folder)


def test_config_that_is_not_json(tmp_path):
    folder = checkpoint(tmp_path, {"x": np.ones(2, np.float32)})
    (folder / "config.json").write_text('{"quantization_config": ' + "[" * 100_000)
    with pytest.raises(jq.QuantError, match=r"config.json: the file is not JSON .nested too deeply."):
        jq.io.load_hf(folder)


# -- traps that give silent garbage elsewhere -------------------------------------------------------------------------


def test_version_1_that_holds_version_2(tmp_path):
    """Symmetric zero points say which version they are, whatever the label says."""
    tensors, config = of_model("gptq_w4g64_sym")
    right, info = jq.io.load_hf(checkpoint(tmp_path / "a", tensors, config))
    assert not info.problems
    ones = np.uint32(0x11111111)
    changed = {n: (a.view(np.uint32) + ones).view(np.int32) if n.endswith("qzeros") else a for n, a in tensors.items()}
    found, info = jq.io.load_hf(checkpoint(tmp_path / "b", changed, config))
    assert info.problems == ("labelled as GPTQ version 1, but its zero points are those of version 2",)
    assert "problem: labelled as GPTQ version 1" in str(info)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[name].dequantize(), right[name].dequantize())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    found, info = jq.io.load_hf(checkpoint(tmp_path / "c", tensors, config))
    assert info.problems == ("labelled as GPTQ version 2, but its zero points are those of version 1",)
    np.testing.assert_array_equal(found[name].dequantize(), right[name].dequantize())


def test_negative_scales_are_kept():
    params, _ = jq.io.load_hf(GOLDEN / "models" / "autoround_w4g64_sym")
    scales = np.concatenate(
        [np.asarray(q.scale, np.float32).reshape(-1) for q in params.values() if hasattr(q, "scale")]
    )
    assert (scales < 0).any()
    assert (scales > 0).any()


@pytest.mark.parametrize("case", [case for case in CASES if case != "torchao"])
def test_parts_in_different_shards(tmp_path, case):
    tensors, config = CASES[case]
    shards = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    one, _ = jq.io.load_hf(written(tmp_path / "one", case))
    many, info = jq.io.load_hf(checkpoint(tmp_path / "many", tensors, config, shards=shards))
    assert len(info.files) == min(3, len(tensors))
    assert one.keys() == many.keys()
    for name, leaf in one.items():
        value = lambda x: np.asarray(x.dequantize() if hasattr(x, "dequantize") else x)  # noqa: E731
        np.testing.assert_array_equal(value(leaf), value(many[name]))


def test_ragged_blocks_of_fp8(tmp_path):
    """20 x 36 in blocks of 16 x 16: the last ones are short."""
    tensors, _ = CASES["fp8"]
    params, _ = jq.io.load_hf(written(tmp_path, "fp8"))
    scale = np.repeat(np.repeat(tensors["m.weight_scale_inv"], 16, 0), 16, 1)[:20, :36]
    wanted = (tensors["m.weight"].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["m.weight"].dequantize(), wanted)


@pytest.mark.parametrize("columns, size", [(80, 32), (96, 64), (40, 64)])
def test_ragged_groups_of_gptq(tmp_path, columns, size):
    rng = np.random.default_rng(0)
    groups, out = -(-columns // size), 16
    codes = rng.integers(0, 16, (columns, out)).astype(np.uint32)
    words = (codes.reshape(-1, 8, out) << (4 * np.arange(8, dtype=np.uint32))[None, :, None]).sum(1).astype(np.uint32)
    scales = rng.random((groups, out)).astype(np.float16)
    parts = {
        "m.qweight": words.view(np.int32),
        "m.scales": scales,
        "m.qzeros": np.full((groups, 2), 0x77777777, np.int32),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True}
    params, _ = jq.io.load_hf(checkpoint(tmp_path, parts, {"quantization_config": config}))
    per_column = scales.astype(np.float32)[np.arange(columns) // size]
    wanted = ((codes.astype(np.float32) - 8) * per_column).astype(np.float16).T
    np.testing.assert_array_equal(params["m.weight"].dequantize(), wanted)


@pytest.mark.parametrize("shape", [(6, 96), (10, 33), (3, 5), (130, 64)])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks_that_straddle_rows(tmp_path, shape, nested):
    """bitsandbytes cuts the flattened weight into blocks of 64, whatever its rows are."""
    rng, count = np.random.default_rng(0), shape[0] * shape[1]
    codes = rng.integers(0, 16, count + count % 2).astype(np.uint8)
    blocks = -(-count // 64)
    table = np.asarray(QTYPES["nf4"].table, np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(shape)}
    parts = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_map": table}
    if nested:
        inner = np.asarray(QTYPES["dynamic8"].table, np.float32)
        absmax, top = rng.integers(0, 256, blocks).astype(np.uint8), rng.random(-(-blocks // 4)).astype(np.float32)
        parts |= {"weight.absmax": absmax, "weight.nested_absmax": top, "weight.nested_quant_map": inner}
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 1.25}
        scale = inner[absmax] * top[np.arange(blocks) // 4] + np.float32(1.25)
    else:
        parts["weight.absmax"] = scale = rng.random(blocks).astype(np.float32)
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    config = {"quantization_config": {"load_in_4bit": True}}
    params, _ = jq.io.load_hf(checkpoint(tmp_path, {f"m.{n}": a for n, a in parts.items()}, config))
    wanted = (table[codes[:count]] * scale[np.arange(count) // 64]).reshape(shape)
    np.testing.assert_array_equal(params["m.weight"].dequantize(), wanted)


def test_nvfp4_divides_as_its_reference_does(tmp_path):
    """scale / global_scale, where a product with the reciprocal rounds elsewhere."""
    tensors, _ = CASES["ct nvfp4"]
    compact = 0
    for top in np.array([123.456, 1000.7, 3.14159, 2688.0], np.float32):
        folder = written(
            tmp_path / str(top), "ct nvfp4", lambda t, c, top=top: t.update({"m.weight_global_scale": top[None]})
        )
        q = jq.io.load_hf(folder)[0]["m.weight"]
        compact += isinstance(q.scale, type(q))
        packed = tensors["m.weight_packed"]
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(8, 64).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        scale = np.repeat(tensors["m.weight_scale"].astype(np.float32) / top, 16, 1)
        np.testing.assert_array_equal(q.dequantize(), (codes * scale).astype(ml_dtypes.bfloat16))
    assert compact > 0


# -- anything at all --------------------------------------------------------------------------------------------------


_DTYPES = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, ml_dtypes.float8_e4m3fn)
_JUNK = (None, True, -1, 0, 1, 3, 7, 1 << 40, 2.5, "", "x", [], [0, 0], {}, {"a": 1}, 1e30)


def _spoiled(data, array):
    """An array that something happened to."""
    array = np.array(array)
    kind = data.draw(st.sampled_from(["dtype", "bytes", "cut", "shape", "transpose", "scalar", "empty"]))
    if kind == "dtype":
        dtype = np.dtype(data.draw(st.sampled_from(_DTYPES)))
        with np.errstate(all="ignore"):
            return array.astype(np.float32).astype(dtype)
    if kind == "bytes":
        raw = bytearray(array.tobytes())
        for at in data.draw(st.lists(st.integers(0, max(len(raw) - 1, 0)), max_size=8)):
            if raw:
                raw[at] = data.draw(st.integers(0, 255))
        return np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    if kind == "cut" and array.ndim:
        return array[: data.draw(st.integers(0, array.shape[0]))]
    if kind == "shape":
        return array.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1)]))) if array.size else array
    if kind == "transpose":
        return np.ascontiguousarray(array.T)
    return array.reshape(-1)[:1].reshape(()) if kind == "scalar" and array.size else array.reshape(-1)[:0]


def _places(config):
    """Every (dict, key) of a configuration."""
    for key, value in config.items():
        yield config, key
        if isinstance(value, dict):
            yield from _places(value)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_happens_to_a_file(tmp_path, case, data):
    """It loads, or is refused with the one exception that there is for it."""

    def spoil(tensors, config):
        for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
            if data.draw(st.booleans()):
                tensors[name] = _spoiled(data, tensors[name])
            else:
                del tensors[name]
        if data.draw(st.booleans()):
            place, key = data.draw(st.sampled_from(list(_places(config))))
            place[key] = data.draw(st.sampled_from(_JUNK))

    folder = written(tmp_path, case, spoil)
    try:
        params, _ = jq.io.load_hf(folder)
    except jq.QuantError as error:
        assert "load_hf" in str(error)  # noqa: PT017
    else:
        for leaf in params.values():
            if isinstance(leaf, jq.QTensor):
                assert leaf.dequantize().shape == leaf.shape
