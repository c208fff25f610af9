"""The commands on checkpoints: what they print, write and refuse, and how they end."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import CASES
from hf_files import checkpoint
from narrowed import instance

import jaxquant as jq
from jaxquant import QuantError, cli, files
from jaxquant.core.qtensor import QTensor
from jaxquant.io import slices
from jaxquant.io.hf.load import open_hf
from jaxquant.io.safetensors import TensorSpec, write_safetensors

GOLDEN = Path(__file__).parent / "golden" / "models"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    w = np.sin(np.arange(64 * 64, dtype=np.float32)).reshape(64, 64)
    arrays = {"model.embed_tokens.weight": w, "proj.weight": w * 3, "norm.weight": w[0]}
    jq.io.save(path / "model.safetensors", arrays)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4}))
    return path


def invoke(*args, code=0):
    result = click.testing.CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    "name, format",
    [("gptq_w4g64_sym", "GPTQ"), ("gguf_Q4_0/model.gguf", "GGUF 3, llama"), ("ct_nvfp4", "compressed-tensors")],
)
def test_inspect_names_the_format_and_the_types(name, format):
    assert f": {format};" in " ".join(invoke("inspect", GOLDEN / name).split())
    summary = json.loads(invoke("inspect", GOLDEN / name, "--json"))
    assert summary["format"] == format
    assert summary["nbytes"] == sum(t["nbytes"] for t in summary["tensors"])


@pytest.mark.parametrize(
    "name, scheme, weights",
    [
        ("gptq_w4g64_actorder", "int4, groups of 64, symmetric, act-order", 12),
        ("awq_gemm_w4g64", "uint4, groups of 64, asymmetric", 12),
        ("bnb_nf4_dq", "nf4, groups of 64, symmetric, two-level scales", 12),
        ("ct_w8a8_int8", "int8, per channel, symmetric", 14),
        ("gguf_Q4_0/model.gguf", "Q4_0", 14),
    ],
)
def test_inspect_says_how_weights_are_quantized(name, scheme, weights):
    output = invoke("inspect", GOLDEN / name)  # where a row has no more than 64 inputs, it is one group
    assert f"; {weights} weights {scheme}; " in " ".join(output.split())
    assert ("activations: int8 before 14 weights\n" in output) == (name == "ct_w8a8_int8")
    assert all(len(line) <= 80 or str(GOLDEN) in line for line in output.splitlines())
    found = json.loads(invoke("inspect", GOLDEN / name, "--json"))
    leaves = jq.io.load_gguf(GOLDEN / name)[0] if ".gguf" in name else jq.io.load_model(GOLDEN / name).params
    assert found["parameters"] == sum(math.prod(leaf.shape) for leaf in leaves.values())


@pytest.mark.every
def test_what_is_asked_of_a_path(tmp_path):
    """A directory with a GGUF file is that file; names of the hub, and of nothing, are refused by each command."""
    shutil.copy(GOLDEN / "gguf_Q4_0" / "model.gguf", tmp_path)
    output = " ".join(invoke("inspect", tmp_path).split())
    assert "; 14 weights Q4_0; 1 weight Q8_0; " in output
    assert "in float: token_embd.weight, vectors" in output
    assert f"runs with: jaxquant generate {tmp_path}, or jq.io.load_gguf('{tmp_path}/model.gguf')" in output
    assert invoke("compare", tmp_path, tmp_path / "model.gguf").endswith("equal\n")
    for command in (["inspect"], ["quantize"], ["compare"], ["convert", "--to", "awq"]):
        more = [] if command == ["inspect"] else [tmp_path / "b"]
        said = invoke(*command, "org/model", *more, code=1)
        assert "names of the hub are not fetched. Fetch it first: huggingface_hub.snapshot_download" in said
        assert "there is no such file or directory" in invoke(*command, tmp_path / "a", *more, code=1)
    assert "this is a GGUF file" in invoke("quantize", tmp_path, tmp_path / "b", code=1)


def test_inspect_lists_tensors_and_weights():
    output = invoke("inspect", GOLDEN / "gguf_Q4_0" / "model.gguf", "--tensors", "--deep")
    assert "blk.0.attn_q.weight" in output
    assert "QTensor(int4[128, 128] -> float32, group 32 on axis -1, symmetric, 9.0 KiB)" in output


def test_a_dry_run_writes_nothing_and_says_what_it_would(source, tmp_path):
    output = invoke("quantize", source, tmp_path / "out", "--group-size", 32, "--dry-run")
    assert "to int4, groups of 32, symmetric:\n  proj.weight  (64, 64), 2.5 KiB\n" in output
    assert "1 weight quantized, 2 tensors as they are" in output
    plan = json.loads(invoke("quantize", source, tmp_path / "out", "--dry-run", "--json"))
    assert not plan["written"]
    assert plan["after"] < plan["before"]
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.every
@pytest.mark.parametrize(
    "options, todo",
    [
        (("--recipe", "nf4"), "Use --to bitsandbytes or --to native."),
        (("--bits", 5, "--to", "gptq"), "Use --to compressed-tensors or --to mlx or --to gguf or --to native."),
        (("--recipe", "w8a8", "--to", "awq"), "Use --to compressed-tensors."),
        (("--recipe", "w8a8:static"), "No format has one. Of activations a file can say int8 or fp8 per token"),
        (("--asymmetric", "--to", "mlx"), "or leave --asymmetric out."),
    ],
)
def test_a_format_without_a_place_for_the_scheme_names_those_with_one(options, todo, source, tmp_path):
    output = invoke("quantize", source, tmp_path / "out", *options, code=1)
    assert "the format has no place for this scheme: " in output
    assert todo in output


@pytest.mark.parametrize(
    "options, qtype, method",
    [
        (("--weights", "int8"), "int8", "compressed-tensors"),
        (("--weights", "uint4", "--asymmetric", "--group-size", 32, "--to", "gptq"), "uint4", "gptq"),
        (("--weights", "nf4", "--group-size", 64, "--to", "bitsandbytes"), "nf4", "bitsandbytes"),
        (("--weights", "uint4", "--asymmetric", "--group-size", 64, "--method", "hqq", "--to", "awq"), "uint4", "awq"),
    ],
)
def test_quantize(options, qtype, method, source, tmp_path):
    invoke("quantize", source, tmp_path / "out", *options)
    params, info = jq.io.load_hf(tmp_path / "out")
    assert info.config["quant_method"] == method
    assert params["proj.weight"].qtype in (qtype, qtype.removeprefix("u"))
    assert not isinstance(params["model.embed_tokens.weight"], jq.QTensor)


def test_gptq_from_saved_grams(source, tmp_path):
    x = np.random.default_rng(2).normal(size=(200, 64)) * np.linspace(0.1, 3, 64)
    jq.io.save(tmp_path / "grams.safetensors", {"proj.weight": (x.T @ x).astype(np.float32)})
    options = ("--weights", "int3", "--group-size", 32, "--to", "compressed-tensors")
    error = {}
    for method, more in (("rtn", ()), ("gptq", ("--grams", tmp_path / "grams.safetensors"))):
        invoke("quantize", source, tmp_path / method, *options, "--method", method, *more)
        found, before = (jq.io.load_hf(path)[0]["proj.weight"] for path in (tmp_path / method, source))
        error[method] = np.linalg.norm(x @ (np.asarray(found.dequantize()) - np.asarray(before)).T)
    assert error["gptq"] < 0.9 * error["rtn"]


@pytest.mark.parametrize(
    "format, scheme",
    [
        ("compressed-tensors", "int4, groups of 64, symmetric"),
        ("gptq", "int4, groups of 64, symmetric"),
        ("awq", "uint4, groups of 64, asymmetric"),
        ("bitsandbytes", "nf4, groups of 64, symmetric"),
        ("mlx", "uint4, groups of 64, asymmetric"),
        ("gguf", "Q4_0"),
        ("native", "int4, groups of 64, symmetric"),
    ],
)
def test_each_format_gets_what_it_needs(format, scheme, source, tmp_path):
    """A Llama's names and dtype; nothing is said but the format."""
    w = jnp.sin(jnp.arange(128 * 64.0)).reshape(64, 128).astype(jnp.bfloat16)
    arrays = {"model.embed_tokens.weight": w, "model.layers.0.mlp.down_proj.weight": w, "lm_head.weight": w}
    jq.io.save(source / "model.safetensors", arrays | {"model.norm.weight": w[0]})
    assert "1 weight quantized, 3 tensors as they are" in invoke("quantize", source, tmp_path / "out", "--to", format)
    assert f"1 weight {scheme}" in " ".join(invoke("inspect", tmp_path / "out").split())
    if format == "native":
        params = jq.io.load(tmp_path / "out")
    elif format == "gguf":
        params = jq.io.load_gguf(tmp_path / "out", names="hf")[0]
    else:
        params = jq.io.load_hf(tmp_path / "out")[0]
    got = np.asarray(params["model.layers.0.mlp.down_proj.weight"].dequantize(jnp.float32))
    assert np.abs(got - np.asarray(w, np.float32)).max() < 0.16  # half the widest step, that of nf4 near -1
    before = json.loads(invoke("quantize", source, tmp_path / "other", "--to", format, "--dry-run", "--json"))
    assert not before["written"]
    assert not (tmp_path / "other").exists()


def test_a_recipe_by_name(source, tmp_path):
    invoke("quantize", source, tmp_path / "out", "--recipe", "w8a8")
    model: Any = jq.io.load_model(tmp_path / "out")
    assert model.info.config["config_groups"]["group_0"]["input_activations"]["num_bits"] == 8
    assert set(model.plan.specs.values()) == {jq.OpSpec(act=jq.recipes.w8a8().act)}  # exactly ours
    invoke("convert", tmp_path / "out", tmp_path / "again", "--to", "compressed-tensors")
    assert jq.io.load_model(tmp_path / "again").plan == model.plan
    assert "activations" in invoke("quantize", source, tmp_path / "no", "--recipe", "w8a8", "--to", "gguf", code=1)
    assert "Use --recipe, or" in invoke("quantize", source, tmp_path / "no", "--recipe", "nf4", "--bits", 4, code=2)
    assert "Use 4, or say the type" in invoke(
        "quantize", source, tmp_path / "no", "--to", "bitsandbytes", "--bits", 8, code=1
    )
    for more, rule in (
        (("--to", "mlx", "--asymmetric"), "leave --asymmetric out"),
        (("--recipe", "llm_int8"), "outliers"),
        (("--recipe", "w4a16:two_level"), "two levels"),
        (("--weights", "nf4", "--to", "bitsandbytes", "--scale-dtype", "float16"), "scales of its own form"),
    ):
        assert rule in invoke("quantize", source, tmp_path / "no", *more, code=1)
    assert not (tmp_path / "no").exists()
    rules = tmp_path / "rules.toml"
    rules.write_text("[[rule]]\npattern = 'proj'\nrecipe = 'w8a8'")
    with pytest.raises(QuantError, match="not activations"):
        files.read_rules(rules)
    assert "Use --rules alone" in invoke("quantize", source, tmp_path / "x", "--rules", rules, "--ignore", "a", code=2)
    rules.write_text("[[rule]]\npattern = 'proj'\nrecipe = 'w4a16:g32:asym'")
    assert files.read_rules(rules) == [jq.Rule("proj", jq.recipes.w4a16(32, symmetric=False))]


def test_rules_from_a_file(source, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text("""
        [[rule]]
        pattern = "embed"
        keep = true
        [[rule]]
        pattern = "proj"
        weight = { qtype = "int3", granularity = "per_group", group_size = 32 }
    """)
    invoke("quantize", source, tmp_path / "out", "--rules", rules)
    assert jq.io.load_hf(tmp_path / "out")[0]["proj.weight"].qtype == "int3"


@pytest.mark.parametrize(
    "text, rule",
    [
        ("[[rule", "not TOML"),
        ("a = 1", "must hold"),
        ("rule = 3", "must hold"),
        ("[[rule]]\npattern = 'x'", "one of keep, recipe and weight"),
        ("[[rule]]\npattern = 'x'\nkeep = false", "one of keep, recipe and weight"),
        ("[[rule]]\npattern = 'x'\nweight = { qtype = 'int9' }", "unknown number type"),
        ("[[rule]]\npattern = '('\nkeep = true", "regular expression"),
    ],
)
def test_bad_rules(text, rule, tmp_path):
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(QuantError, match=rule):
        files.read_rules(tmp_path / "rules.toml")


def test_refusals_end_with_code_1_and_a_message(source, tmp_path):
    for options in (("--group-size", 48), ("--keep", "nothing"), ("--weights", "int9"), ("--weights", "nf4")):
        assert "Error: " in invoke("quantize", source, tmp_path / "out", *options, code=1)
    assert "quantized already" in invoke("quantize", GOLDEN / "bnb_nf4", tmp_path / "out", code=1)
    (source / "model.safetensors").write_bytes(b"")
    assert "shorter than" in invoke("inspect", source, code=1)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "gguf", "native"])
def test_convert_keeps_every_value(format, tmp_path):
    invoke("convert", GOLDEN / "gptq_w4g64_sym", tmp_path / "out", "--to", format)
    assert invoke("compare", GOLDEN / "gptq_w4g64_sym", tmp_path / "out").endswith("equal\n")


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


def w8a8(folder, *, dynamic=True, groups=1):
    """A directory of compressed-tensors with int8 activations."""
    rng = np.random.default_rng(0)
    weights = {"strategy": "channel"} if groups == 1 else {"strategy": "group", "group_size": 32 // groups}
    acts = INT8 | {"strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": INT8 | weights, "input_activations": acts}
    tensors: dict[str, Any] = {"m.weight": rng.integers(-127, 128, (32, 32)).astype(np.int8)}
    tensors["m.weight_scale"] = rng.random((32, groups)).astype(np.float16)
    if not dynamic:
        tensors["m.input_scale"] = np.float32(0.1)
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return checkpoint(folder, tensors, {"torch_dtype": "float32", "quantization_config": config})


def test_convert_keeps_activations_that_the_layout_can_say(tmp_path):
    source = w8a8(tmp_path / "a")
    assert "note" not in invoke("convert", source, tmp_path / "b", "--to", "compressed-tensors")
    first, second = (jq.io.load_model(tmp_path / name) for name in "ab")
    assert first.plan == second.plan
    x, product = np.ones((2, 32), np.float32), lambda p, x: jnp.einsum("bi,oi->bo", x, p["m.weight"].astype(x.dtype))
    y = jq.quantized(product, first)(first.params, x)
    np.testing.assert_array_equal(y, jq.quantized(product, second)(second.params, x))


@pytest.mark.parametrize("kind", [{"dynamic": False}, {"groups": 2}, {}], ids=str)
def test_convert_says_which_activations_are_lost(kind, tmp_path):
    source = w8a8(tmp_path / "a", **kind)
    for format in ("native", "compressed-tensors") if kind else ("native", "gptq"):
        out = invoke("convert", source, tmp_path / format, "--to", format)
        assert "note: the source quantizes activations (int8" in out
        assert "the result holds its weights alone" in out
        result = jq.io.load_model(tmp_path / format)  # with no range that nothing uses
        assert set(result.params) == {"m.weight"}
        assert result.plan is None


def test_convert_leaves_out_ranges_that_the_source_does_not_use(tmp_path):
    source = w8a8(tmp_path / "a", dynamic=False)
    text = json.loads((source / "config.json").read_text())
    del text["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    (source / "config.json").write_text(json.dumps(text))
    out = invoke("convert", source, tmp_path / "b", "--to", "compressed-tensors")
    assert "note: tensors that describe activations are left out, since no scheme uses them (m.input_scale)." in out
    assert set(jq.io.load_model(tmp_path / "b").params) == {"m.weight"}


def test_a_directory_without_its_configuration(source, tmp_path):
    """Codes without config.json are no float weights: all commands say so, and where."""
    shutil.copytree(w8a8(tmp_path / "a"), tmp_path / "b", ignore=shutil.ignore_patterns("config.json"))
    said = "codes, and no configuration that says of which format"
    inspected = invoke("inspect", tmp_path / "b")
    assert said in inspected
    assert "/b: an unknown format;" in " ".join(inspected.split())
    assert "runs with" not in inspected
    assert said in invoke("quantize", tmp_path / "b", tmp_path / "c", code=1)
    assert said in invoke("convert", tmp_path / "b", tmp_path / "c", "--to", "gptq", code=1)
    output = invoke("convert", source, tmp_path / "c", "--to", "gptq", code=1)
    assert "nothing in the source is quantized" in output
    assert "Use jaxquant quantize" in output
    assert not (tmp_path / "c").exists()


def test_convert_needs_a_new_destination(tmp_path):
    for format in ("gguf", "native", "awq"):
        assert "destination exists" in invoke("convert", GOLDEN / "gptq_w4g64_sym", GOLDEN, "--to", format, code=1)


def test_convert_reads_each_leaf_twice_and_says_how_far_it_is(tmp_path):
    calls = []
    source = GOLDEN / "gguf_Q4_0" / "model.gguf"
    files.convert(source, tmp_path / "a.safetensors", "native", progress=lambda *args: calls.append(args))
    count = len(jq.io.load_gguf(source)[0])
    assert [done for done, _, _ in calls] == list(range(2 * count))
    assert {total for _, total, _ in calls} == {2 * count}
    params, _ = jq.io.load_gguf(source, names="hf")
    again = jq.io.load(tmp_path / "a.safetensors")
    assert again.keys() == params.keys()
    for name, leaf in params.items():
        for x, y in zip(jax.tree.leaves(leaf), jax.tree.leaves(again[name]), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_an_interrupted_conversion_is_continued(tmp_path):
    source = GOLDEN / "gptq_w4g64_sym"

    def stop(done, total, name):
        if done == total - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.convert(source, tmp_path / "out", "awq", progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial"}
    with pytest.raises(QuantError, match="partial directory of something else"):
        files.convert(source, tmp_path / "out", "compressed-tensors")
    files.convert(source, tmp_path / "out", "awq")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("case", ["fp8", "bnb nested", "ct pack", "mxfp4", "hqq axis 0"])
def test_values_are_the_same_in_slices(case, tmp_path, monkeypatch):
    """Blocks over several rows, nested scales, permutations, stacks, and codes that are not stored row by row."""
    monkeypatch.setattr(slices, "_SLICE", 40)
    tensors, config = CASES[case]
    leaves = open_hf(checkpoint(tmp_path, tensors, config), function="compare")
    leaf = next(leaves[name] for name in leaves.modules)
    parts = [x for x, _ in files._slices(leaf, leaf)]
    assert len(parts) > 1
    np.testing.assert_array_equal(np.concatenate(parts), instance(jq.QTensor, leaf).dequantize(np.float32))


MEMORY = """
import sys
from pathlib import Path
import jax
from jaxquant import files
source, other, kind = map(Path, sys.argv[1:])
if kind.name == "compare":
    assert files.compare(source, other).equal
elif kind.name == "nothing":
    jax.numpy.zeros(3)
else:
    files.convert(source, other, kind.name)
with open("/proc/self/status") as file:  # ru_maxrss would be the parent's
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024)
"""


LARGE = [
    pytest.param(shape, count, kind, marks=pytest.mark.slow)
    for shape, count in (((512, 2048), 300), ((4096, 2048), 30), ((8192, 4096), 8))
    for kind in ("compressed-tensors", "native", "gguf")
]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("shape, count, kind", [((512, 2048), 80, "compressed-tensors"), *LARGE])
def test_memory_does_not_grow_with_the_checkpoint(shape, count, kind, tmp_path, capsys):
    """GPTQ to another format, and both compared: 3 times a tensor's float32 size and 50 MB above a process with JAX."""
    rng = np.random.default_rng(0)
    out, width = shape
    q = QTensor(
        rng.integers(0, 256, (out, width // 2)).astype(np.uint8),
        rng.uniform(0.5, 1, (out, width // 64)).astype(np.float16),
        None, qtype="int4", dtype=np.float16, length=width,
    )  # fmt: skip
    source = tmp_path / "source"
    config = {"model_type": "llama", "num_attention_heads": 8}
    jq.io.save_hf(source, {f"{i}.weight": q for i in range(count)}, format="gptq", config=config)
    lines = []
    for step in (kind, "compare", "nothing"):
        program = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / kind), step]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines.append((step, int(done.stdout)))
    size = sum(path.stat().st_size for path in source.iterdir())
    with capsys.disabled():
        text = ", ".join(f"{step} {peak / 1e6:.0f}" for step, peak in lines)
        print(
            f"\n{count} tensors of {4 * out * width / 1e6:.0f} MB in float32 ({size / 1e6:.0f} MB): peaks in MB: {text}"
        )
    least = dict(lines)["nothing"]
    for step, peak in lines:
        assert peak < least + 3 * 4 * out * width + 50e6, step
    shutil.rmtree(tmp_path)


def test_convert_from_gguf_to_what_vllm_reads_and_back(tmp_path):
    source = GOLDEN / "gguf_Q4_0" / "model.gguf"
    invoke("convert", source, tmp_path / "ct", "--to", "compressed-tensors")
    invoke("compare", source, tmp_path / "ct")
    output = invoke("convert", tmp_path / "ct", tmp_path / "a.gguf", "--to", "gguf", code=1)
    assert "architecture is not known" in output  # GGUF has no config.json to take over


def test_convert_refuses_what_would_have_to_be_quantized_anew(tmp_path):
    assert "no reordered columns" in invoke(
        "convert", GOLDEN / "gptq_w4g64_actorder", tmp_path / "out", "--to", "awq", code=1
    )
    assert not list(tmp_path.iterdir())


def test_compare_says_how_far_apart(source, tmp_path):
    invoke("quantize", source, tmp_path / "out", "--weights", "int8")
    result = json.loads(invoke("compare", source, tmp_path / "out", "--json", code=3))
    assert not result["equal"]
    errors = {t["name"]: t["relative"] for t in result["tensors"]}
    assert 0 < errors["proj.weight"] < 0.01
    assert errors["norm.weight"] == 0
    jq.io.save(tmp_path / "other.safetensors", {"norm.weight": jnp.ones(64), "more": jnp.ones(1)})
    output = invoke("compare", source, tmp_path / "other.safetensors", code=3)
    assert "only in" in output
    assert "more" in output


HOSTILE = {"a\x1b]0;PWNED\x07\x1b[2J[red].weight": (8, 32), "b\nproblem: none\x9b.weight": (8, 32)}


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "SOURCE", "--tensors"],
        ["inspect", "SOURCE", "--deep"],
        ["inspect", "SOURCE", "--json"],
        ["quantize", "SOURCE", "OUT", "--weights", "int8", "--dry-run"],
        ["quantize", "SOURCE", "OUT", "--weights", "int8"],
        ["quantize", "SOURCE", "OUT", "--group-size", "7"],
        ["quantize", "SOURCE", "OUT", "--rules", "RULES"],
        ["compare", "SOURCE", "OTHER"],
        ["convert", "SOURCE", "OUT", "--to", "native"],
        ["convert", "SOURCE", "OUT", "--to", "gguf", "--architecture", "llama"],
    ],
    ids=lambda command: " ".join(command),
)
def test_names_that_a_terminal_would_act_on_are_escaped(command, tmp_path):
    for place, names in ("source", HOSTILE), ("other", {f"{name}\r": shape for name, shape in HOSTILE.items()}):
        (tmp_path / place).mkdir()
        specs = {name: TensorSpec(np.dtype(np.float32), shape) for name, shape in names.items()}
        path = tmp_path / place / "model.safetensors"
        write_safetensors(path, specs, lambda name, specs=specs: np.ones(specs[name].shape, np.float32), {})
    (tmp_path / "rules").write_text('[[rule]]\npattern = "b\\u001b"\nkeep = true')
    places = {"SOURCE": "source", "OUT": "out", "OTHER": "other", "RULES": "rules"}
    words = [str(tmp_path / places[word]) if word in places else word for word in command]
    result = click.testing.CliRunner().invoke(cli.main, words)
    assert result.output.strip()
    assert all(line.isprintable() for line in result.output.split("\n"))
    assert not any(line.startswith("problem: none") for line in result.output.split("\n"))
