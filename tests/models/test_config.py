"""Configurations: those of well-known models are read, and what would change the arithmetic is refused by name."""

import math

import numpy as np
import pytest

import jaxquant as jq
from jaxquant.models import config_of
from jaxquant.models.config import ARCHITECTURES

pytestmark = pytest.mark.every

TINY = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}

# As their authors publish them, without the fields that every file has.
PUBLISHED = {
    "Llama 3.2 1B": {
        "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "SmolLM2 135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
        "transformers.js_config": {"dtype": "q4"},
    },
    "Qwen2.5 0.5B": {
        "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3 30B A3B": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Mixtral 8x7B": {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "vocab_size": 32000,
    },
    "Gemma 2B": {
        "model_type": "gemma", "attention_bias": False, "head_dim": 256, "hidden_act": "gelu",
        "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192,
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
    },
    "Gemma 3 4B": {
        "model_type": "gemma3", "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152},
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    },
}  # fmt: skip
PARAMETERS = {  # by their authors, in millions; 2 percent for what is rounded
    "Llama 3.2 1B": 1236, "SmolLM2 135M": 134.5, "Qwen2.5 0.5B": 494, "Qwen3 30B A3B": 30532, "Mixtral 8x7B": 46703,
    "Gemma 2B": 2506, "Gemma 3 4B": 3880,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    config = config_of(PUBLISHED[name])
    count = sum(math.prod(shape) for shape in config.shapes().values())
    assert count == pytest.approx(PARAMETERS[name] * 1e6, rel=0.01)


def test_layers_of_gemma_3():
    """Five layers see a window at a base frequency of their own, then one sees everything at a scaled one."""
    layers = config_of(PUBLISHED["Gemma 3 4B"]).layers
    assert [i for i, layer in enumerate(layers) if layer.window is None] == [5, 11, 17, 23, 29]
    local, whole = (np.array(layers[i].rope.frequencies) for i in (0, 5))
    np.testing.assert_allclose(local, 1e4 ** -(np.arange(128) / 128), rtol=1e-6)
    np.testing.assert_allclose(whole, 1e6 ** -(np.arange(128) / 128) / 8, rtol=1e-6)


def test_llama_3_scales_long_waves_only():
    rope = config_of(PUBLISHED["Llama 3.2 1B"]).layers[0].rope
    plain = 5e5 ** -(np.arange(32) / 32)
    turns = 8192 * plain / (2 * np.pi)
    found = np.array(rope.frequencies)
    np.testing.assert_allclose(found[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(found[turns < 1], plain[turns < 1] / 32, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((plain / 32 < found) & (found < plain))[between].all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gpt2"}, r"architecture is not supported; got model_type='gpt2'. Supported are llama, mistral"),
        ({"model_type": None}, "architecture is not supported"),
        ({"residual_multiplier": 0.2, "clip_qkv": 8}, "unknown fields of the configuration: clip_qkv, residual_mult"),
        ({"hidden_act": "relu2"}, "activation is not supported; got hidden_act='relu2'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "not supported; got rope_type='longrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "fields=.'mrope_section'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks fields"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}}, "fields=.'high_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "rotated in part"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types contradict"),
        ({"layer_types": ["full_attention"]}, "a kind of attention for each layer"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "use_sliding_window is off"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
         "window of unknown size"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "got use_bidirectional_attention=True"),
        ({"rope_interleaved": True}, "got rope_interleaved=True"),
        ({"num_attention_heads": 0}, "positive integer; got num_attention_heads=0"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "heads do not fit"),
    ],
)  # fmt: skip
def test_refusals(fields, message):
    with pytest.raises(jq.QuantError, match=message):
        config_of({"model_type": "llama", **TINY, **fields})


def test_fields_can_be_ignored_by_name():
    config = {"model_type": "llama", **TINY, "my_note": 3}
    with pytest.raises(jq.QuantError, match="my_note"):
        config_of(config)
    assert config_of(config, ignore=["my_note"]) == config_of({"model_type": "llama", **TINY})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_null_is_the_default(name):
    config = {"model_type": name, **TINY, "num_key_value_heads": 1}
    every = config_of({**config, "num_key_value_heads": None})
    assert every.num_key_value_heads == every.num_attention_heads
    assert config_of({**config, "rope_scaling": None, "head_dim": None, "unheard_of": None}) == config_of(config)
