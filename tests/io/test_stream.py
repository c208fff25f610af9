"""Quantizing checkpoints on disk: the same result as in memory, whatever happens on the way."""

import functools
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax_settings import needs_jit
from narrowed import present

import jaxquant as jq
from jaxquant import QuantError, Rule, recipes
from jaxquant.io import atomic, stream
from jaxquant.io.safetensors import TensorSpec, write_safetensors

RULES = [Rule("lm_head", None), Rule(r"proj\.weight", recipes.w4a16(group_size=32))]


def write(path, arrays):
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, specs, arrays.__getitem__, {"format": "pt"})


def model(layers=4):
    rng = np.random.default_rng(0)
    arrays = {
        f"layers.{i}.proj.weight": rng.normal(size=(64, 96)) * 10.0 ** rng.normal(size=(64, 1)) for i in range(layers)
    }
    arrays |= {"norm.weight": rng.normal(size=96), "lm_head.weight": rng.normal(size=(10, 96))}
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    arrays = model()
    names = sorted(arrays)
    halves = {"a-1.safetensors": names[:3], "a-2.safetensors": names[3:]}
    for file, part in halves.items():
        write(path / file, {name: arrays[name] for name in part})
    weight_map = {name: file for file, part in halves.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "test"}))
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    return path


def digests(path):
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


@pytest.fixture
def grams(tmp_path):
    """Of inputs that are not alike."""
    rng = np.random.default_rng(1)
    found = {}
    for name in (f"layers.{i}.proj.weight" for i in range(4)):
        x = rng.normal(size=(300, 96)) @ rng.normal(size=(96, 96)) * 10.0 ** rng.normal(size=96)
        found[name] = (x.T @ x).astype(np.float32)
    write(tmp_path / "grams.safetensors", found)
    return tmp_path / "grams.safetensors"


def test_gptq_with_grams_from_disk(source, grams, tmp_path):
    """The codes are those of the method in memory."""
    spec = recipes.w4a16(32)
    jq.io.quantize_hf(source, tmp_path / "out", [Rule("proj", spec)], method=jq.ptq.gptq, grams=grams)
    params, _ = jq.io.load_hf(tmp_path / "out")
    known = jq.io.load(grams)
    for name, w in model().items():
        if name in known:
            stats = {"gram": {"gram": known[name][None]}}
            want = jq.ptq.gptq(jax.numpy.asarray(w), present(spec.weight), reduce_axes=(-1,), stats=stats)
            np.testing.assert_array_equal(params[name].logical_codes(), want.logical_codes())


def test_tensors_in_place_of_those_of_the_source(source, tmp_path):
    """Weights and floats are taken from there; of another shape or name they are refused before anything is written."""
    arrays, name = model(), "layers.1.proj.weight"
    for of in (name, "norm.weight"):
        arrays[of] = (arrays[of].astype(np.float32) * 3).astype(ml_dtypes.bfloat16)
    write(tmp_path / "moved.safetensors", {of: arrays[of] for of in (name, "norm.weight")})
    jq.io.quantize_hf(source, tmp_path / "out", RULES, moved=tmp_path / "moved.safetensors")
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole" / "model.safetensors", arrays)
    jq.io.quantize_hf(tmp_path / "whole", tmp_path / "wanted", RULES)
    made, wanted = (jq.io.load_hf(tmp_path / place)[0] for place in ("out", "wanted"))
    for of, leaf in wanted.items():
        jax.tree.map(np.testing.assert_array_equal, made[of], leaf)
    for of, value in ((name, arrays[name][:1]), ("nothing", arrays["norm.weight"])):
        write(tmp_path / "other.safetensors", {of: value})
        with pytest.raises(QuantError, match="does not fit the checkpoint"):
            jq.io.quantize_hf(source, tmp_path / "no", RULES, moved=tmp_path / "other.safetensors")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("no")]


def test_grams_are_checked_first(source, grams, tmp_path):
    run = functools.partial(jq.io.quantize_hf, source, tmp_path / "out", RULES, method=jq.ptq.gptq)
    with pytest.raises(QuantError, match="needs the Gram matrix"):
        run()
    other = tmp_path / "other.safetensors"
    write(other, {"layers.0.proj.weight": np.eye(96, dtype=np.float32), "layers.1.proj.weight": np.eye(95)})
    with pytest.raises(QuantError, match=r"(?s)another weight's.*layers.1.proj"):
        run(grams=other)
    assert not (tmp_path / "out.partial").exists()


def test_the_result_is_that_of_quantizing_in_memory(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_SLICE", 96 * 24)  # slices of 24 rows, the last one shorter
    before = digests(source)
    plan = jq.io.quantize_hf(source, tmp_path / "out", RULES)
    assert digests(source) == before
    params, info = jq.io.load_hf(tmp_path / "out")
    expected, _ = jq.io.load_hf(source, rules=RULES)
    assert params.keys() == expected.keys()
    for name, leaf in expected.items():
        got = params[name]
        if isinstance(leaf, jq.QTensor):
            np.testing.assert_array_equal(got.logical_codes(), leaf.logical_codes())
            np.testing.assert_array_equal(got.scale, leaf.scale)
        else:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(leaf))
    assert info.model["model_type"] == "test"
    assert plan.left_out == ("pytorch_model.bin",)
    assert plan.weights.keys() == {f"layers.{i}.proj.weight" for i in range(4)}
    assert set(plan.floats) == {"norm.weight", "lm_head.weight"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    written = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert 0 <= written - plan.after < 4096  # the header of the file


@pytest.mark.parametrize("format, spec", [("gptq", {"scale_dtype": "float16"}), ("bitsandbytes", {})])
def test_other_formats(format, spec, source, tmp_path):
    qtype = "nf4" if format == "bitsandbytes" else "int4"
    weight = jq.QuantSpec(qtype, granularity="per_group", group_size=32, **spec)
    rules = [Rule("lm_head", None), Rule("proj", jq.OpSpec(weight))]
    jq.io.quantize_hf(source, tmp_path / "out", rules, format=format)
    params, _ = jq.io.load_hf(tmp_path / "out")
    assert params["layers.0.proj.weight"].qtype == qtype


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 7))
def test_an_interrupted_run_is_continued_to_the_same_bytes(at, source, tmp_path):
    kwargs: Any = {"shard_bytes": 4000}
    jq.io.quantize_hf(source, tmp_path / "whole", RULES, **kwargs)
    calls = []

    def stop(done, total, name):
        calls.append(name)
        if len(calls) == at:
            raise Stop

    with pytest.raises(Stop):
        jq.io.quantize_hf(source, tmp_path / "out", RULES, **kwargs, progress=stop)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob(".*"))
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("*.safetensors")}
    seen = []
    jq.io.quantize_hf(source, tmp_path / "out", RULES, **kwargs, progress=lambda done, total, name: seen.append(done))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert kept == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept}  # not written again
    assert seen == sorted(seen)
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_ended_just_before_its_end_is_complete(source, tmp_path, monkeypatch):
    jq.io.quantize_hf(source, tmp_path / "whole", RULES)
    remove = os.remove

    def fail(path):
        if str(path) == str(tmp_path / "out" / "plan.json"):
            raise Stop
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", fail)
        with pytest.raises(Stop):
            jq.io.quantize_hf(source, tmp_path / "out", RULES)
    jq.io.quantize_hf(source, tmp_path / "out", RULES)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    with pytest.raises(QuantError, match="destination exists"):
        jq.io.quantize_hf(source, tmp_path / "out", RULES)


KILLED = """
import os, signal, sys
import jaxquant as jq
from jaxquant import Rule, recipes
at = int(sys.argv[3])
count = 0
write, rename = os.fsync, os.rename
def die(*args):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
def fsync(*args):
    die()
    return write(*args)
def renamed(*args):
    die()
    return rename(*args)
os.fsync, os.rename = fsync, renamed
rules = [Rule("lm_head", None), Rule(r"proj\\.weight", recipes.w4a16(group_size=32))]
jq.io.quantize_hf(sys.argv[1], sys.argv[2], rules, shard_bytes=4000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 4, 6, 8])
def test_killed_at_any_point_source_and_destination_are_sound(at, source, tmp_path):
    before = digests(source)
    program = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    done = subprocess.run([*program, str(at)], capture_output=True, text=True)
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    assert digests(source) == before
    if done.returncode:
        assert not (tmp_path / "out").exists()
        jq.io.quantize_hf(source, tmp_path / "out", RULES, shard_bytes=4000)
    jq.io.quantize_hf(source, tmp_path / "whole", RULES, shard_bytes=4000)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, rule",
    [
        (lambda rules: [Rule("attention", recipes.w8a16())], "matches no weight"),
        (lambda rules: [Rule("proj", None)], "no rule quantizes a weight"),
        (lambda rules: [Rule("proj", recipes.w4a16(group_size=64))], "group"),
        (lambda rules: [Rule("proj", recipes.nf4(32))], "not on the format's grid"),
    ],
)
def test_all_is_checked_before_the_first_byte(change, rule, source, tmp_path):
    with pytest.raises(QuantError, match=rule):
        jq.io.quantize_hf(source, tmp_path / "out", change(RULES))
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_scales_that_the_format_cannot_hold_are_known_beforehand(source, tmp_path):
    with pytest.raises(QuantError, match="float16"):
        jq.io.quantize_hf(source, tmp_path / "out", RULES, format="gptq")
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_a_full_disk_is_known_beforehand(source, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and Usage())
    with pytest.raises(QuantError, match="disk is too full"):
        jq.io.quantize_hf(source, tmp_path / "out", RULES)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


class Usage:
    free = 1000


def test_a_partial_directory_of_something_else_is_refused(source, tmp_path):
    def stop(*args):
        raise Stop

    with pytest.raises(Stop):
        jq.io.quantize_hf(source, tmp_path / "out", RULES, progress=stop)
    kept = digests(tmp_path / "out.partial")
    with pytest.raises(QuantError, match="partial directory of something else"):
        jq.io.quantize_hf(source, tmp_path / "out", [Rule("proj", recipes.w8a16())])
    os.utime(source / "a-1.safetensors")  # the source has changed
    with pytest.raises(QuantError, match="partial directory of something else"):
        jq.io.quantize_hf(source, tmp_path / "out", RULES)
    assert digests(tmp_path / "out.partial") == kept


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_a_weight_with_nan_is_named(tmp_path, bad, dtype):
    arrays = {name: array.astype(dtype) for name, array in model(2).items()}
    arrays["layers.1.proj.weight"][3, 5] = bad
    write(tmp_path / "model.safetensors", arrays)
    with pytest.raises(QuantError, match=r"layers\.1\.proj\.weight.*must be finite"):
        jq.io.quantize_hf(tmp_path, tmp_path / "out", RULES)
    assert not (tmp_path / "out").exists()


def test_a_quantized_source_is_refused(tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "models" / "gptq_w4g64_sym"
    with pytest.raises(QuantError, match="quantized already"):
        jq.io.quantize_hf(golden, tmp_path / "out", RULES)


MEMORY = """
import sys
import jaxquant as jq
from jaxquant import Rule, recipes
jq.io.quantize_hf(sys.argv[1], sys.argv[2], [Rule("proj", recipes.w4a16(group_size=64))])
with open("/proc/self/status") as file:  # ru_maxrss would be the parent's
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024)
"""


@needs_jit  # each operation keeps its result and is a program
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(512, 2048)] * 30, id="30 of 4 MB"),
        pytest.param(
            [(2**i, 512 * j) for i in range(2, 6) for j in (1, 2, 3)] * 100,
            id="1200 of 96 KB and less",
            marks=pytest.mark.slow,
        ),
        pytest.param([(512, 2048)] * 200, id="200 of 4 MB", marks=pytest.mark.slow),
        pytest.param([(4096, 2048)] * 25, id="25 of 32 MB", marks=pytest.mark.slow),
        pytest.param([(8192, 4096)] * 8, id="8 of 128 MB", marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded_by_the_largest_tensor(shapes, tmp_path, capsys):
    """The peak does not grow with the number of tensors. Above a process that quantizes a small one, it is below 3 of
    the largest tensor and 5 MB for the programs of each shape."""
    small, distinct = [(64, 64)], sorted(set(shapes))
    least, once, whole = (_peak(tmp_path / str(i), each) for i, each in enumerate((small, distinct, shapes)))
    largest = 4 * max(map(math.prod, shapes))
    with capsys.disabled():
        print(f"\n{len(shapes)} tensors of up to {largest / 1e6:.1f} MB: peak {whole / 1e6:.0f} MB")
    assert whole < once + largest + 24e6
    assert once < least + 3 * largest + 5e6 * len(distinct)


def _peak(directory, shapes):
    """The peak of a process that quantizes tensors of these shapes, JAX and the interpreter included."""
    specs = {f"{i}.proj.weight": TensorSpec(np.dtype(np.float32), shape) for i, shape in enumerate(shapes)}
    values = np.random.default_rng(0).normal(size=max(map(math.prod, shapes))).astype(np.float32)
    (directory / "source").mkdir(parents=True)
    read = lambda name: values[: math.prod(specs[name].shape)].reshape(specs[name].shape)  # noqa: E731
    write_safetensors(directory / "source" / "model.safetensors", specs, read, {})
    program = [sys.executable, "-c", MEMORY, str(directory / "source"), str(directory / "out")]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    shutil.rmtree(directory / "source")
    return int(done.stdout)
