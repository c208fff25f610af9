"""A prompt through a decoder of any format that jaxquant reads: what `jaxquant generate` does, in a few lines.

    python examples/llama.py DIRECTORY --prompt "Once upon a time" --tokens 64 --cache int8

Without a tokenizer beside the weights the prompt is ids: --prompt 1,5,9. The weights stay as they are in the file; the
cache of keys and values is in float, or in int8 with a scale per token and head.
"""

import argparse

from jaxquant import models


def main():
    parser = argparse.ArgumentParser(description="Continue a prompt with a Hugging Face directory or a GGUF file.")
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt", default="1", help="a text, or ids of tokens with commas between them")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--cache", choices=["float", "int8"], default="float")
    args = parser.parse_args()
    model = models.load(args.checkpoint)
    print(model)
    ids = args.prompt.replace(",", "").isdigit()
    prompt = [int(i) for i in args.prompt.split(",")] if ids else args.prompt
    print(*models.generate(model, [prompt], tokens=args.tokens, cache=args.cache))


if __name__ == "__main__":
    main()
