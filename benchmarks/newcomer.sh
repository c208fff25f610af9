#!/usr/bin/env bash
# What a newcomer types, in a fresh environment, from installing to a text and a number; counts the lines.
#
#     bash benchmarks/newcomer.sh          # benchmarks/results/newcomer.txt has what it printed
#
# The checkpoint is made on the spot: a small random decoder with a tokenizer of letters stands for the model that one has.
# Every line that a newcomer would type is printed with "$ " before it, and run; the rest prepares and counts.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export JAX_PLATFORMS=cpu
typed=0
began=$SECONDS

type_() {
    typed=$((typed + 1))
    printf '\n$ %s\n' "$1"
    bash -c "$1"
}

type_ "python -m venv env && env/bin/pip install -q '$root[cli,generate]' flax"
export PATH="$work/env/bin:$PATH"

python - "$root" <<'MAKE'
import json, shutil, sys
import tokenizers

shutil.copytree(f"{sys.argv[1]}/tests/golden/decoders/llama", "model")
letters = "abcdefghijklmnopqrstuvwxyz .,?!:ABCDE"
vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
inner.decoder = tokenizers.decoders.Fuse()
inner.add_special_tokens(["<pad>", "<s>", "</s>"])
inner.save("model/tokenizer.json")
json.dump({"bos_token": "<s>", "add_bos_token": True}, open("model/tokenizer_config.json", "w"))
open("text", "w").write("the quick brown fox jumps over the lazy dog. " * 20)
MAKE

cat >one_call.py <<'CALL'
import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
model, x = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(10)]), jnp.ones((8, 512))
params = model.init(jax.random.key(0), x)
small = jq.quantize_model(model.apply, params, x, recipe="w4a16")
y = jax.jit(small.fn)(small.params, x); print(small.report)
CALL
sed 's/^/  /' one_call.py
typed=$((typed + 2)) # the last two lines of it are jaxquant's, the others are the model one has
type_ "python one_call.py"
type_ "jaxquant quantize model model-int8 --bits 8"
type_ "jaxquant inspect model-int8 | head -4"
type_ "jaxquant generate model-int8 --prompt 'the quick' --tokens 12"
type_ "jaxquant eval model-int8 --text text --reference model"
type_ "jaxquant compare model model-int8 | tail -3 || true"

printf '\n%d lines typed, %d seconds\n' "$typed" "$((SECONDS - began))"
