"""The commands ``jaxquant generate`` and ``jaxquant eval``: texts on standard output, the rest on error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from jaxquant.io.strict_json import Json
from jaxquant.models.console import refusals, shown
from jaxquant.models.evaluation import Evaluation, evaluate
from jaxquant.models.generation import Sampling, Times, stream, tokens_of
from jaxquant.models.load import Model, load, place_of
from jaxquant.models.tokenizer import read_text, tokenizer_of

__all__ = ["eval_", "generate"]


def _check_tokenizer(model: Path, other: Path | None) -> None:
    """Raises before weights are read, which takes time, if there is no tokenizer."""
    place = place_of(model) if other is None else other
    if place.is_dir():
        tokenizer_of(place)


def _as_told(activations: Any, cache: str | None = None) -> dict[str, Any]:
    """The arguments of `load` for two options: keys and values stay in float if either says float."""
    return {"activations": activations, "cache": "float" if "float" in (activations, cache) else "saved"}


def _note(text: str) -> None:
    click.echo(shown(text), err=True)


def _of_models(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which model, and how it is run."""
    for option in (
        click.option("--ignore-field", "ignore", multiple=True, metavar="NAME", help="Field of the configuration that "
                     "is not known and leaves the result as it is."),
        click.option("--tokenizer", type=click.Path(file_okay=False, path_type=Path), help="Directory of another "
                     "tokenizer.json."),
        click.option("--activations", type=click.Choice(["saved", "inputs", "float"]), default="saved",
                     show_default=True, help="As the checkpoint says (W8A8, fp8, keys and values); without its "
                     "rounding of outputs; or all in --dtype."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
                     show_default=True, help="Of activations and float weights."),
        click.argument("model", type=click.Path(path_type=Path)),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A text to continue; several make a batch.")
@click.option("--ids", multiple=True, metavar="N,N,..", help="The same as ids of tokens, without a tokenizer.")
@click.option("--chat", is_flag=True, help="Each prompt is what a user says: apply the model's chat template.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="At most so many new ones.")
@click.option("--cache", type=click.Choice(["float", "int8"]), help="Of keys and values.  [as the checkpoint says; "
              "float]")  # fmt: skip
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=int, help="Choose among so many of the most likely tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Choose among the most likely tokens that "
              "have this probability together.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choices.")
@_of_models
def generate(
    model: Path, prompts: tuple[str, ...], ids: tuple[str, ...], chat: bool, tokens: int, cache: Any,
    temperature: float, top_k: int | None, top_p: float, seed: int, dtype: str, activations: Any,
    tokenizer: Path | None, ignore: tuple[str, ...],
) -> None:  # fmt: skip
    """Continue a prompt with a model, quantized or not.

    MODEL is a Hugging Face directory or a GGUF file, in any format that jaxquant reads. The text goes to standard
    output as it comes; what runs, and how fast, to standard error.
    """
    if bool(prompts) == bool(ids):
        raise click.UsageError("give --prompt TEXT, or --ids N,N,.. where there is no tokenizer")
    if ids and chat:
        raise click.UsageError("--chat needs --prompt")
    given = [_numbers(text) for text in ids]
    sampling = Sampling(temperature, top_k, top_p, seed)
    with refusals():
        sampling.checked()
        if prompts:
            _check_tokenizer(model, tokenizer)
        loaded = load(model, dtype=dtype, tokenizer=tokenizer, ignore=ignore, **_as_told(activations, cache))
        _note(str(loaded))
        rows = given or _tokens(loaded, prompts, chat)
        times = Times()
        chunks = stream(loaded, rows, tokens=tokens, cache=cache, sampling=sampling, times=times)
        if len(rows) == 1:
            found = (i for chunk in chunks for i in chunk[0])
            for piece in loaded.tokenizer.pieces(found) if prompts else (f"{i} " for i in found):
                click.echo(shown(piece), nl=False)
            click.echo()
        else:
            all_chunks = list(chunks)
            for row, prompt in enumerate(prompts or ids):
                new = [i for chunk in all_chunks for i in chunk[row]]
                text = loaded.tokenizer.decode(new) if prompts else " ".join(map(str, new))
                click.echo(shown(f"{prompt}\n  -> {text}"))
    _note(_times(times, rows))


def _numbers(text: str) -> list[int]:
    try:
        return [int(i) for i in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--ids takes numbers with commas between them, not {text!r}") from None


def _tokens(model: Model, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    if not chat:
        return tokens_of(model, prompts)
    texts = [model.tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    return tokens_of(model, [model.tokenizer.encode(text, chat=True) for text in texts])


def _times(times: Times, rows: Sequence[Sequence[int]]) -> str:
    step = 1000 * times.decoding / max(times.steps, 1)
    each = f" for each of {len(rows)} prompts" if len(rows) > 1 else ""
    return (
        f"prompt: {sum(map(len, rows))} tokens in {times.prompt:.2f} s. new: {times.steps} tokens{each}, "
        f"{step:.1f} ms a step. compiled in {times.compiling:.1f} s"
    )


@click.command("eval")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="A file in "
              "UTF-8.")  # fmt: skip
@click.option("--reference", type=click.Path(path_type=Path), help="Another model, such as the same in float: how far "
              "the probabilities are from its.")  # fmt: skip
@click.option("--window", type=click.IntRange(2), help="Tokens that see one another.  [2048, or the model's]")
@click.option("--tokens", type=click.IntRange(2), help="Only so many from the beginning of the text.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_of_models
def eval_(
    model: Path, text: Path, reference: Path | None, window: int | None, tokens: int | None, as_json: bool, dtype: str,
    activations: Any, tokenizer: Path | None, ignore: tuple[str, ...],
) -> None:  # fmt: skip
    """Measure a model on a text: perplexity, and divergence.

    MODEL and the reference are Hugging Face directories or GGUF files. The text is cut into windows that do not
    overlap; all tokens of a window but the first are predicted.
    """
    with refusals():
        _check_tokenizer(model, tokenizer)
        options = {"dtype": dtype, "tokenizer": tokenizer, "ignore": ignore, **_as_told(activations)}
        loaded = load(model, **options)
        _note(str(loaded))
        other = None if reference is None else load(reference, **options)
        if other is not None:
            _note(f"reference {other}")
        ids = loaded.tokenizer.encode(read_text(text, function="eval"))[:tokens]
        contexts = [one.config.context for one in (loaded, other) if one is not None and one.config.context]
        window = min([2048, *contexts]) if window is None else window
        found = evaluate(loaded, ids, reference=other, window=window, progress=_progress())
    if as_json:
        click.echo(json.dumps(_as_json(loaded, found), indent=2))
        return
    click.echo(f"perplexity  {found.perplexity:.4f}  ({found.nll:.4f} nats a token)")
    if found.kl is not None:
        click.echo(f"reference   {found.reference_perplexity:.4f}  ({found.reference_nll:.4f} nats a token)")
        click.echo(f"divergence  {found.kl:.5f} nats a token; the same first choice at {found.agreement:.1%}")
    click.echo(f"tokens      {found.tokens} predicted, in {found.windows} windows of {found.window}")
    click.echo(f"time        {1000 * found.running / found.tokens:.2f} ms a token; compiled in {found.compiling:.1f} s")


def _progress() -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None
    return lambda done, total: click.echo(f"\rwindow {done} of {total}" + "\n" * (done == total), err=True, nl=False)


def _as_json(model: Model, found: Evaluation) -> dict[str, Json]:
    weights = [{"kind": kind, "tensors": n, "bytes": size} for kind, (n, size) in model.kinds.items()]
    return {
        "model": model.path,
        "architecture": model.config.architecture,
        "format": model.format,
        "weights": weights,
        "notes": list(model.notes),
        "perplexity": found.perplexity,
        "nll": found.nll,
        "reference_perplexity": found.reference_perplexity,
        "reference_nll": found.reference_nll,
        "kl": found.kl,
        "agreement": found.agreement,
        "tokens": found.tokens,
        "windows": found.windows,
        "window": found.window,
        "seconds_a_token": found.running / found.tokens,
        "seconds_compiling": found.compiling,
    }
