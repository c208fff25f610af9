"""Writes the checkpoints of this directory: small random models as transformers saves them, and what they compute.

    pip install transformers==5.23.0 torch
    python tests/golden/transformers/make.py

Each directory has ``config.json``, ``model.safetensors`` and ``ref.safetensors`` with inputs and float32 outputs. Every
weight, bias and norm is random, so that one in the wrong place shows.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

t: Any = importlib.import_module("transformers")  # where it is not installed, types would be those of this directory
TEXT = {"vocab_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=48, n_positions=16, n_embd=32, n_layer=2, n_head=2, activation_function="gelu_new")
    ),
    "opt": t.OPTForCausalLM(
        t.OPTConfig(**TEXT, hidden_size=32, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=16)
    ),
    "bert": t.BertForSequenceClassification(
        t.BertConfig(**TEXT, hidden_size=32, intermediate_size=64, max_position_embeddings=16, num_labels=3)
    ),
    "vit": t.ViTForImageClassification(
        t.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=(8, 12),
            patch_size=4, num_labels=3,
        )
    ),
}  # fmt: skip


def main() -> None:
    for name, model in MODELS.items():
        torch.manual_seed(0)
        model = model.eval().float()
        for parameter in model.parameters():
            parameter.data.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.2)
        directory = Path(__file__).parent / name
        if name == "vit":
            inputs = {"pixel_values": torch.randn(2, 3, 8, 12)}
        else:
            inputs = {"input_ids": torch.randint(3, 48, (2, 7))}
        if name == "bert":
            inputs["token_type_ids"] = torch.randint(0, 2, (2, 7))
        with torch.no_grad():
            logits = model(**inputs).logits
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        save_file({**inputs, "logits": logits}, directory / "ref.safetensors")


if __name__ == "__main__":
    main()
