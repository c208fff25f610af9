"""Small random decoders of every architecture, made by transformers; `make` writes one, and what it computes.

    python tests/models/decoders.py        # writes tests/golden/decoders anew; needs transformers and torch

Sizes are unequal, every weight, bias and norm is random, windows are shorter than the sequences, and scalings of rotary
embeddings have every kind of frequency in them. Weights are bfloat16; what they compute is in float32.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "decoders"

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
#: Name -> (transformers' names of configuration and model, settings).
DECODERS = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8, "rope_parameters": YARN}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 20, "final_logit_softcapping": 2.0,
         "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 20, "num_hidden_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
         }},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 2, "head_dim": 8}),
}  # fmt: skip
MASK = np.array([[0] * 3 + [1] * 9, [1] * 12, [0] + [1] * 11], np.int64)  # padding on the left


def make(name, directory, seed=0):
    """Writes the decoder to ``directory``; returns what it computes of padded tokens: ids, mask, logits in float32."""
    import torch
    import transformers

    kind, settings = DECODERS[name]
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**{**SIZES, **settings})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        # Of a norm, around 1; of the rest so large that attention, experts and caps all have something to choose.
        parameter.data.normal_(0.7 if parameter.ndim == 1 else 0.0, 0.3)
        parameter.data = parameter.data.bfloat16().float()
    rng = np.random.default_rng(seed)
    ids = np.where(MASK == 1, rng.integers(3, SIZES["vocab_size"], MASK.shape), 0)
    places = np.maximum(np.cumsum(MASK, 1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(MASK), position_ids=torch.tensor(places),
            use_cache=False,
        ).logits  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(directory)
    return {"ids": ids.astype(np.int32), "mask": MASK.astype(np.int32), "logits": out.numpy()}


def main():
    from jaxquant.io.safetensors import TensorSpec, write_safetensors

    for name in DECODERS:
        directory = GOLDEN / name
        found = make(name, directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        specs = {key: TensorSpec(a.dtype, a.shape) for key, a in found.items()}
        write_safetensors(directory / "ref.safetensors", specs, found.__getitem__, {"format": "pt"})


if __name__ == "__main__":
    main()
