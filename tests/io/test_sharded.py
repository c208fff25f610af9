"""Directories of safetensors files: what is found, and indexes that lie."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import QuantError
from jaxquant.io.safetensors import TensorSpec, write_safetensors
from jaxquant.io.sharded import Checkpoint, read_json

INDEX = "model.safetensors.index.json"


def write(path, **arrays):
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, specs, arrays.__getitem__, {})


def index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "a-1.safetensors", w=np.arange(3), s=np.float32(2))
    write(tmp_path / "a-2.safetensors", b=np.ones((2, 2), np.float16))
    index(tmp_path, {"w": "a-1.safetensors", "s": "a-1.safetensors", "b": "a-2.safetensors"})
    return tmp_path


def test_shards_are_one_checkpoint(shards):
    checkpoint = Checkpoint(shards)
    assert checkpoint.tensors.keys() == {"w", "s", "b"}
    assert checkpoint.place["b"] == "a-2.safetensors"
    np.testing.assert_array_equal(checkpoint.array("w"), np.arange(3))
    np.testing.assert_array_equal(checkpoint.array("b"), np.ones((2, 2)))
    assert checkpoint.json("config.json") is None
    (shards / "config.json").write_text('{"a": 1}')
    assert checkpoint.json("config.json") == {"a": 1}


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_single_files(name, tmp_path):
    write(tmp_path / name, w=np.arange(3))
    for path in (tmp_path, tmp_path / name):
        np.testing.assert_array_equal(Checkpoint(path).array("w"), np.arange(3))


@pytest.mark.parametrize(
    "name", ["../a-1.safetensors", "/etc/passwd", "x/a-1.safetensors", "..", "", "a.bin", 3, None, INDEX]
)
def test_an_index_cannot_leave_its_directory(name, shards):
    index(shards, {"w": name})
    with pytest.raises(QuantError, match="of its own directory only") as error:
        Checkpoint(shards)
    assert "'w'" in str(error.value)


@pytest.mark.parametrize(
    "weight_map, rule",
    [
        ([], "needs a weight_map"),
        ({}, "needs a weight_map"),
        ({"w": "gone.safetensors"}, "files that are not there"),
        ({"w": "a-2.safetensors", "b": "a-2.safetensors"}, "a tensor that its file does not have"),
        ({"w": "a-1.safetensors", "x": "a-1.safetensors"}, "a tensor that its file does not have"),
        ({"w": "a-1.safetensors"}, "tensors that the index does not name"),
    ],
)
def test_index_and_files_must_agree(weight_map, rule, shards):
    index(shards, weight_map)
    with pytest.raises(QuantError, match=rule):
        Checkpoint(shards)


def test_a_tensor_in_two_files(shards):
    write(shards / "a-2.safetensors", w=np.arange(3))
    index(shards, {"w": "a-1.safetensors", "s": "a-1.safetensors", "v": "a-2.safetensors"})
    with pytest.raises(QuantError, match="in two files"):
        Checkpoint(shards)


def test_nothing_to_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(QuantError, match=r"no safetensors file.*pickled"):
        Checkpoint(tmp_path)
    write(tmp_path / "a.safetensors", w=np.arange(3))
    write(tmp_path / "b.safetensors", w=np.arange(3))
    with pytest.raises(QuantError, match="need an index"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "\udcff"])
def test_json_files_are_read_strictly(text, tmp_path):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(QuantError, match="JSON") as error:
        read_json(tmp_path / "config.json", function="f")
    assert "config.json" in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(["w", "s", "b", "x"]), st.sampled_from(["a-1.safetensors", "../x"]) | json_values)
)
def test_any_index_is_refused_or_right(tmp_path_factory, weight_map):
    directory = tmp_path_factory.getbasetemp() / "index"
    directory.mkdir(exist_ok=True)
    write(directory / "a-1.safetensors", w=np.arange(3), s=np.float32(2))
    index(directory, weight_map)
    try:
        checkpoint = Checkpoint(directory)
    except QuantError:
        return
    assert weight_map == {"w": "a-1.safetensors", "s": "a-1.safetensors"} == checkpoint.place


def test_names_of_the_hub_and_its_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuantError, match=r"load_hf at org/model: .*not fetched.*snapshot_download\('org/model'\)"):
        jq.io.load_hf("org/model")
    cache = tmp_path / "models--org--model"
    for revision in ("a1", "b2"):
        (cache / "snapshots" / revision).mkdir(parents=True)
        jq.io.save(cache / "snapshots" / revision / "model.safetensors", {"w": np.ones(int(revision[1]))})
    with pytest.raises(QuantError, match=r"does not say which snapshot is meant; got snapshots=\('a1', 'b2'\)"):
        jq.io.load_hf(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b2")
    assert jq.io.load_hf(cache)[0]["w"].shape == (2,)
    (cache / "refs" / "main").write_text("c3")
    with pytest.raises(QuantError, match="does not say which snapshot is meant"):
        jq.io.load_hf(cache)
    jq.io.save(tmp_path / "model.safetensors", {"w": np.ones(7)})  # a model that keeps snapshots beside itself
    (cache / "snapshots").rename(tmp_path / "snapshots")
    assert jq.io.load_hf(tmp_path)[0]["w"].shape == (7,)
    with pytest.raises(FileNotFoundError):
        jq.io.load_hf("../model")
