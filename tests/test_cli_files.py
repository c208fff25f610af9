"""The commands on checkpoints: what they print, write and refuse, and how they end."""

import json
from pathlib import Path

import click.testing
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant import QuantError, cli, files

GOLDEN = Path(__file__).parent / "golden" / "models"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    w = jnp.sin(jnp.arange(64 * 64.0)).reshape(64, 64)
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
    assert f": {format}, " in invoke("inspect", GOLDEN / name)
    summary = json.loads(invoke("inspect", GOLDEN / name, "--json"))
    assert summary["format"] == format
    assert summary["nbytes"] == sum(t["nbytes"] for t in summary["tensors"])


def test_inspect_lists_tensors_and_weights():
    output = invoke("inspect", GOLDEN / "gguf_Q4_0" / "model.gguf", "--tensors", "--deep")
    assert "blk.0.attn_q.weight" in output
    assert "QTensor(int4[128, 128] -> float32, group 32 on axis -1, symmetric, 9.0 KiB)" in output


def test_a_dry_run_writes_nothing_and_says_what_it_would(source, tmp_path):
    output = invoke("quantize", source, tmp_path / "out", "--group-size", 32, "--dry-run")
    assert "int4[64, 64] -> float32, group 32" in output
    assert "1 weights quantized, 2 tensors as they are" in output
    plan = json.loads(invoke("quantize", source, tmp_path / "out", "--dry-run", "--json"))
    assert not plan["written"]
    assert plan["after"] < plan["before"]
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


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
        ("[[rule]]\npattern = 'x'", "either keep or weight"),
        ("[[rule]]\npattern = 'x'\nkeep = false", "either keep or weight"),
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


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "gguf", "jaxquant"])
def test_convert_keeps_every_value(format, tmp_path):
    invoke("convert", GOLDEN / "gptq_w4g64_sym", tmp_path / "out", "--to", format)
    assert invoke("compare", GOLDEN / "gptq_w4g64_sym", tmp_path / "out").endswith("equal\n")


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
