"""Files that are a part of something: read with the rest of it, or refused; never taken for the whole."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from hf_files import checkpoint

import jaxquant as jq
from jaxquant import QuantError, cli
from jaxquant.io.gguf.container import TensorInfo, write_gguf
from jaxquant.io.gguf.types import BY_NAME

METADATA = {
    "general.architecture": "llama",
    "general.name": "whole",
    "llama.attention.head_count": np.uint32(2),
    "llama.scores": np.array([1, np.nan], np.float32),
    "tokens": ["a", "b"],
}
ARRAYS = {
    "token_embd.weight": np.arange(64, dtype=np.float32).reshape(2, 32),
    "blk.0.attn_q.weight": np.arange(8 * 32, dtype=np.float32).reshape(8, 32) - 50,
    "blk.1.attn_q.weight": np.arange(8 * 32, dtype=np.float32).reshape(8, 32) + 50,
    "output_norm.weight": np.arange(32, dtype=np.float32),
}


def part(path, arrays, metadata):
    kinds = {name: TensorInfo(BY_NAME["F32"], array.shape) for name, array in arrays.items()}
    stored = lambda name: arrays[name].view(np.uint8).reshape(kinds[name].stored_shape)  # noqa: E731
    write_gguf(path, metadata, kinds, stored)
    return path


def numbers(i, count, tensors=4):
    """What llama.cpp writes: its kinds of numbers differ by version."""
    return {"split.no": np.uint16(i), "split.count": np.uint16(count), "split.tensors.count": np.int32(tensors)}


def split(folder, cuts=((), (0, 1), (2, 3)), stem="m"):
    """Parts with these tensors each; the first has all metadata, as llama.cpp writes it."""
    folder.mkdir(exist_ok=True)
    names, count = list(ARRAYS), len(cuts)
    return [
        part(
            folder / f"{stem}-{i + 1:05}-of-{count:05}.gguf",
            {names[k]: ARRAYS[names[k]] for k in cut},
            (METADATA if i == 0 else {}) | numbers(i, count),
        )
        for i, cut in enumerate(cuts)
    ]


def test_any_part_stands_for_all_of_them(tmp_path):
    paths = split(tmp_path / "parts")
    whole, _ = jq.io.load_gguf(part(tmp_path / "whole.gguf", ARRAYS, METADATA), names="hf")
    for path in paths:
        params, info = jq.io.load_gguf(path, names="hf")
        assert list(params) == list(whole)
        for name in whole:
            np.testing.assert_array_equal(params[name], whole[name])
        assert info.files == tuple(map(str, paths))
        assert (info.architecture, info.kind) == ("llama", "model")
        assert info.metadata.keys() == METADATA.keys()  # what is written with it is a whole file
        assert len(info.reordered) == 2  # the heads, which the first part has


def test_the_reference_splits_and_we_join(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test", split_max_tensors=3)
    writer.add_string("general.name", "whole")
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert len(found) == 2
    params, info = jq.io.load_gguf(found[1])
    assert info.metadata["general.name"] == "whole"
    assert params.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(params[name], array)


def test_programs_take_a_part_for_all_of_them(tmp_path):
    paths = split(tmp_path / "parts")
    whole = part(tmp_path / "whole.gguf", ARRAYS, METADATA)

    def invoke(*args):
        result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.output

    assert "GGUF 3, llama, 3 parts" in invoke("inspect", paths[2])
    assert "GGUF 3, llama, 3 parts" in invoke("inspect", paths[0])
    found = json.loads(invoke("inspect", paths[1], "--json"))
    assert {t["name"] for t in found["tensors"]} == ARRAYS.keys()
    invoke("convert", paths[1], tmp_path / "joined.gguf", "--to", "gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == whole.read_bytes()
    assert "equal" in invoke("compare", paths[2], whole)


def fewer(folder, paths):
    paths[1].unlink()
    return paths[0], r"parts of the model are missing; got missing=\('m-00002-of-00003.gguf',\)"


def renamed(folder, paths):
    return paths[2].rename(folder / "model.gguf"), "one of several parts.*split_no=2, split_count=3"


def swapped(folder, paths):
    shutil.copy(paths[1], paths[2])
    return paths[0], "m-00003-of-00003.gguf.*not part 3 of 3.*split_no=1"


def of_a_split_into_two(folder, paths):
    other = split(folder / "other", ((0, 1), (2, 3)))
    shutil.copy(other[1], paths[1])
    return paths[2], "m-00002-of-00003.gguf.*not part 2 of 3.*split_count=2"


def of_another_model(folder, paths):
    part(paths[2], {"blk.9.attn_q.weight": np.ones((8, 32), np.float32)}, numbers(2, 3))
    return paths[0], "not as many as there should be; got tensors=3, split_tensors_count=4"


def of_another_count(folder, paths):
    names = ["blk.1.attn_q.weight", "output_norm.weight"]
    part(paths[2], {name: ARRAYS[name] for name in names}, numbers(2, 3, tensors=5))
    return paths[0], "m-00003-of-00003.gguf.*not as many as there should be; got tensors=4, split_tensors_count=5"


def without_the_count(folder, paths):
    part(paths[0], {}, METADATA | {"split.no": np.uint16(0), "split.count": np.uint16(3)})
    return paths[0], "split_tensors_count=None"


def tensors_twice(folder, paths):
    part(paths[2], {name: ARRAYS[name] for name in list(ARRAYS)[1:3]}, numbers(2, 3))
    return paths[0], "'blk.0.attn_q.weight'.*a tensor is in two parts"


def another_architecture(folder, paths):
    names = ["blk.1.attn_q.weight", "output_norm.weight"]
    part(paths[2], {name: ARRAYS[name] for name in names}, numbers(2, 3) | {"general.architecture": "qwen2"})
    return paths[0], "'general.architecture'.*two parts say different things"


def no_metadata(folder, paths):
    return part(folder / "n-00001-of-00002.gguf", ARRAYS, METADATA), "one of several parts, by its name"


def a_part_that_is_cut(folder, paths):
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    return paths[0], "m-00003-of-00003.gguf.*reaches beyond the file|m-00003-of-00003.gguf.*ends before"


def no_number(folder, paths):
    part(paths[0], {}, METADATA | numbers(0, 3) | {"split.count": "3"})
    return paths[0], "split.count.*not a number of parts"


def beyond_the_last(folder, paths):
    return part(folder / "n-00004-of-00003.gguf", {}, METADATA | numbers(3, 3)), "one of several parts"


@pytest.mark.parametrize(
    "spoil",
    [
        fewer, renamed, swapped, of_a_split_into_two, of_another_model, of_another_count, without_the_count,
        tensors_twice, another_architecture, no_metadata, a_part_that_is_cut, no_number, beyond_the_last,
    ],
)  # fmt: skip
def test_parts_that_are_no_model_are_refused_with_the_reason(spoil, tmp_path):
    path, rule = spoil(tmp_path, split(tmp_path))
    with pytest.raises(QuantError, match=rule):
        jq.io.load_gguf(path)


@pytest.mark.parametrize("metadata", [{}, numbers(0, 1), {"split.count": np.uint16(0)}])
@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00001.gguf"])
def test_a_file_that_is_all(name, metadata, tmp_path):
    params, info = jq.io.load_gguf(part(tmp_path / name, ARRAYS, METADATA | metadata))
    assert params.keys() == ARRAYS.keys()
    assert info.metadata.keys() == METADATA.keys()


def test_metadata_of_a_part_is_not_written(tmp_path):
    with pytest.raises(QuantError, match=r"one of several parts.*split\.no"):
        jq.io.save_gguf(tmp_path / "a.gguf", ARRAYS, metadata=METADATA | numbers(0, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["adapter", "imatrix"])
def test_what_is_no_model_is_refused(kind, tmp_path):
    path = part(tmp_path / "a.gguf", {"blk.0.attn_q.weight.lora_a": np.ones((2, 32), np.float32)},
                {"general.architecture": "llama", "general.type": kind})  # fmt: skip
    with pytest.raises(QuantError, match=f"general.type.*of a model that is in another file.*{kind}|adapter"):
        jq.io.load_gguf(path)
    assert f"GGUF 3, llama, {kind}" in " ".join(CliRunner().invoke(cli.main, ["inspect", str(path)]).output.split())


def test_an_encoder_of_images_says_what_it_is(tmp_path):
    metadata = {"general.architecture": "clip", "general.type": "mmproj"}
    assert jq.io.load_gguf(part(tmp_path / "a.gguf", ARRAYS, metadata))[1].kind == "mmproj"


# -- safetensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.fp16-00002-of-00003.safetensors"])
def test_a_shard_is_not_a_checkpoint(name, tmp_path):
    tensors = {"a.weight": np.ones((4, 32), np.float32)}
    folder = checkpoint(tmp_path / "in", tensors, {}, shards=dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").unlink()
    for path in (folder, folder / name):
        with pytest.raises(QuantError, match=r"one of \d parts, by its name.*Name the directory"):
            jq.io.load_hf(path)
    with pytest.raises(QuantError, match="one of"):
        jq.io.quantize_hf(folder, tmp_path / "out", [jq.Rule("a", jq.recipes.w8a16())])


def test_one_of_one_is_all(tmp_path):
    tensors = {"a.weight": np.ones((4, 32), np.float32)}
    folder = checkpoint(tmp_path / "in", tensors, {}, shards=dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))
    assert list(jq.io.load_hf(folder)[0]) == ["a.weight"]


def test_our_own_codes_are_not_plain_arrays(tmp_path):
    q = jq.quantize(np.ones((4, 32), np.float32), jq.QuantSpec("int4"), reduce_axes=(-1,))
    jq.io.save(tmp_path / "model.safetensors", {"proj.weight": q})
    with pytest.raises(QuantError, match=r"jaxquant's own.*jq\.io\.load"):
        jq.io.load_hf(tmp_path)


# -- damaged files -----------------------------------------------------------------------------------------------------


def damaged(content, seed):
    """Copies with a few bits turned, most of them in the header; and cut ones."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        raw = bytearray(content)
        for _ in range(rng.integers(1, 5)):
            at = rng.integers(0, len(raw) if rng.random() < 0.3 else min(len(raw), 400))
            raw[at] ^= 1 << rng.integers(0, 8)
        yield bytes(raw)
    for _ in range(20):
        yield content[: rng.integers(0, len(content))]


@pytest.mark.parametrize("kind", ["gguf", "split", "native", "safetensors"])
def test_turned_bits_and_cut_files_are_refused_or_read(kind, tmp_path):
    """No other exception, no warning, and no more memory than the file gives reason for."""
    if kind in ("gguf", "split"):
        path = split(tmp_path)[0] if kind == "split" else part(tmp_path / "a.gguf", ARRAYS, METADATA)
        read = lambda: jq.io.load_gguf(path)[0]  # noqa: E731
    elif kind == "native":
        path = tmp_path / "a.safetensors"
        spec = jq.QuantSpec("int4", granularity="per_group", group_size=16)
        q = jq.quantize(ARRAYS["token_embd.weight"], spec, reduce_axes=(-1,))
        jq.io.save(path, {"q": q, "b": [np.ones(3, np.float32), None]})
        read = lambda: jq.io.load(path)  # noqa: E731
    else:
        path = checkpoint(tmp_path / "in", {"a.weight": np.ones((4, 8), np.float32)}, {}) / "model.safetensors"
        read = lambda: jq.io.load_hf(tmp_path / "in")[0]  # noqa: E731
    refused = 0
    for content in damaged(path.read_bytes(), seed=0):
        path.write_bytes(content)
        try:
            read()
        except QuantError:
            refused += 1
    assert refused >= 20  # the cut ones, at least
