"""The command line: ``jaxquant demo | inspect | quantize | convert | compare | generate | eval``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

try:
    import click
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table
except ModuleNotFoundError:
    raise SystemExit("jaxquant: the command line needs click and rich. Run: pip install 'jaxquant[cli]'") from None

from jaxquant import QuantError, __version__, files, quantize_files
from jaxquant.core.errors import printable
from jaxquant.core.paths import folded
from jaxquant.core.units import in_bytes, in_millions
from jaxquant.io.save_hf import FORMATS
from jaxquant.models import commands
from jaxquant.models.console import refusals

__all__ = ["main"]


def _say(text: str) -> None:
    """Prints a line on standard output; names come from untrusted files."""
    click.echo(printable(text))


def _some(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _require(extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"not installed: {', '.join(missing)}. Run: pip install 'jaxquant[{extra}]'")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="jaxquant %(version)s")
def main() -> None:
    """Quantization for JAX and Flax."""


@main.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="jaxquant-demo",
    show_default=True,
    help="Directory for the checkpoints, the plot and results.json.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of initial values and batches.")
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True, help="Of training in float.")
@click.option("--qat-epochs", type=click.IntRange(1), default=15, show_default=True, help="Of training at 2 bits.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def demo(output: Path, seed: int, epochs: int, qat_epochs: int, as_json: bool) -> None:
    """Train, quantize and compare a small model.

    Trains a perceptron on scikit-learn's digits and saves it; quantizes what was saved to 8, 4, 3 and 2 bits; trains it
    further at 2 bits; reloads all checkpoints and compares size, accuracy and speed.
    """
    _require("demo", "flax", "optax", "sklearn", "matplotlib")
    from jaxquant import demo as demonstration
    from jaxquant.demo.show import table

    try:
        result = demonstration.run(
            output, seed=seed, epochs=epochs, qat_epochs=qat_epochs, console=rich.console.Console(stderr=True)
        )
    except (OSError, QuantError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(result.to_json())
        return
    console = rich.console.Console()
    console.width = max(console.width, 80)  # the table must not be cut where output is piped
    console.print(table(result.rows, test_images=result.settings["test_images"], batch=result.settings["batch"]))
    for row in result.rows:
        click.echo(f"{row.scheme:<12}{row.checkpoint}")
    click.echo(f"{'plot':<12}{result.plot}")
    click.echo(f"{'results':<12}{result.file}")


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]], **options: Any) -> None:
    """A table on standard output; not cut where output is piped."""
    table = rich.table.Table(box=None, pad_edge=False, **options)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(rich.markup.escape(printable(cell)) for cell in row))
    console = rich.console.Console(highlight=False)
    width = sum(max(len(printable(row[i])) for row in (columns, *rows)) + 2 for i in range(len(columns)))
    console.width = max(console.width, width)
    console.print(table)


# -- inspect -----------------------------------------------------------------------------------------------------------


@main.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--deep", is_flag=True, help="Also read the weights, one at a time, and say what each one is.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_(path: Path, tensors: bool, deep: bool, as_json: bool) -> None:
    """Say what a checkpoint holds: format, types, bytes, problems.

    PATH is a Hugging Face directory, a safetensors file or a GGUF file. Headers are read, and one weight of each kind;
    with --deep all weights are.
    """
    with refusals():
        summary = files.summary(path, deep=deep)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary), indent=2))
        return
    click.echo(_described(path, summary))
    kinds: dict[str, list[int]] = {}
    for tensor in summary.tensors:
        count = kinds.setdefault(tensor.type, [0, 0])
        count[0] += 1
        count[1] += tensor.nbytes
    _print(("type", "tensors", "bytes"), [(kind, str(n), in_bytes(size)) for kind, (n, size) in kinds.items()])
    if tensors:
        rows = [(t.name, t.type, "x".join(map(str, t.shape)), in_bytes(t.nbytes)) for t in summary.tensors]
        _print(("tensor", "type", "shape", "bytes"), rows)
    for name, what in summary.weights.items():
        _say(f"{name}  {what}")
    for problem in summary.problems:
        _say(f"problem: {problem}")


def _described(path: Path, summary: files.Summary) -> str:
    """Format and scheme, size; the matrices that are in float; the command and the function that read it."""
    schemes = [f"{_some(n, 'weight')} {scheme}" for scheme, n in summary.schemes.items()]
    size = f"{in_millions(summary.parameters)} parameters, {in_bytes(summary.nbytes)}"
    bits = f"{8 * summary.nbytes / max(1, summary.parameters):.2f} bits each"
    said = ["; ".join([f"{path}: {summary.format}", *schemes, f"{size}, {bits}"])]
    if schemes and not summary.problems:
        said.append(f"in float: {', '.join([*summary.floats, 'vectors'])}")
    said += [f"activations: {what}" for what in summary.activations]
    if not summary.problems:
        command = f"jaxquant generate {path}, or " if summary.generates else ""
        said.append(f"runs with: {command}{summary.reader}({summary.path!r})")
    wrap = functools.partial(textwrap.fill, width=80, subsequent_indent="  ", break_long_words=False)
    return "\n".join(wrap(printable(text), break_on_hyphens=False) for text in said)


# -- quantize ----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "format",
    type=click.Choice(quantize_files.TARGETS),
    default=FORMATS[0],
    show_default=True,
    help="The layout to write: a directory of this layout, or a GGUF or native file.",
)
@click.option("--recipe", metavar="NAME", help="Scheme by name, such as w4a16:g128, w8a16, nf4, w8a8.")
@click.option("--bits", type=click.IntRange(2, 8), help="Width of the weights.  [4]")
@click.option("--weights", "qtype", help="Number type of the weights, in place of --bits.")
@click.option(
    "--group-size",
    type=click.IntRange(-1),
    help="Inputs that share a scale; -1: all of them.  [64 below 8 bits; mlx 64; gguf 32]",
)
@click.option("--asymmetric", is_flag=True, help="With zero points (unsigned types).  [awq: always]")
@click.option(
    "--scale-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the scales.  [that of the checkpoint; gptq, awq and gguf: float16]",
)
@click.option(
    "--method",
    metavar="NAME",
    help="How codes are chosen: rtn (to nearest), hqq; by inputs: gptq, clipped, descend, autoround, or after awq or "
    "smoothquant have moved scales: awq, awq+gptq.  [rtn; gptq with --calibrate or --grams]",
)
@click.option(
    "--calibrate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text in UTF-8 to run the float model on, so that the method knows the inputs of each weight.",
)
@click.option(
    "--grams",
    type=click.Path(exists=True, path_type=Path),
    help="Instead: a safetensors file with the Gram matrix of the inputs of each weight, under its name.",
)
@click.option(
    "--rules",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with rules, instead of the options above.",
)
@click.option(
    "--ignore",
    "--keep",
    "ignore",
    multiple=True,
    metavar="PATTERN",
    help="Weights to leave in float, besides embeddings, head and routers of experts.",
)
@click.option(
    "--misfit",
    type=click.Choice(["per_channel", "float"]),
    help="Weights whose inputs no group divides: one scale for each output, or left in float.  [refused]",
)
@click.option("--architecture", help="With gguf, llama.cpp's name of the model's architecture.  [from the source]")
@click.option("--shard-size", type=click.IntRange(1), default=4096, show_default=True, help="MiB of a file at most.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and its size; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def quantize(
    source: Path, destination: Path, format: str, recipe: str | None, bits: int | None, qtype: str | None,
    group_size: int | None, asymmetric: bool, scale_dtype: str | None, method: str | None, calibrate: Path | None,
    grams: Path | None, rules: Path | None, ignore: tuple[str, ...], misfit: Literal["per_channel", "float"] | None,
    architecture: str | None, shard_size: int, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Quantize a float checkpoint, tensor by tensor, however large.

    SOURCE is a directory with safetensors files; DESTINATION must not exist. The defaults suit the format:
    4 bits in groups of 64, with scales in the dtype of the checkpoint, unless --help says otherwise. All checks that
    need no weights run first. An interrupted run leaves DESTINATION.partial; the same command continues it.
    gptq and others need the inputs of each weight. --calibrate TEXT collects them for the decoders that
    `jaxquant generate` runs, mixtures of experts too, with one layer in memory at a time; finished layers are kept on
    the disk, in DESTINATION.calibration, until the end. For other models, collect the inputs with jaxquant.calibrate.
    awq and smoothquant move scales between the weights and norms of a layer, so norms change too.
    """
    if calibrate is not None and grams is not None:
        raise click.UsageError("Use --calibrate or --grams, not both")
    method = method or ("rtn" if calibrate is None and grams is None else "gptq")
    asked = quantize_files.Scheme(recipe, qtype, bits, group_size, asymmetric, scale_dtype)
    if rules is not None and (asked != quantize_files.Scheme() or ignore or misfit):
        raise click.UsageError("Use --rules alone, or the other options of the scheme, --ignore and --misfit")
    if recipe is not None and (qtype or bits or group_size is not None or asymmetric):
        raise click.UsageError("Use --recipe, or --weights, --bits, --group-size and --asymmetric, not both")
    if architecture is not None and format != "gguf":
        raise click.UsageError("--architecture is for --to gguf")
    with refusals():
        source, act = files.place(source, "quantize"), None
        if rules is not None:
            chosen = files.read_rules(rules)
        else:
            spec = quantize_files.scheme_of(asked, format, source)
            act, chosen = spec.act, quantize_files.rules_of(spec, source, ignore, misfit)
        arguments: dict[str, Any] = {"format": format, "method": method, "grams": grams, "act": act}
        arguments |= {
            "calibrate": calibrate,
            "architecture": architecture,
            "shard_bytes": shard_size << 20,
            "dry_run": dry_run,
        }
        with _progress(counted=calibrate is not None or format in ("gguf", "native")) as progress:
            plan = quantize_files.quantize(source, destination, chosen, **arguments, progress=progress)
    _show_quantized(plan, dry_run=dry_run, as_json=as_json)


def _show_quantized(plan: quantize_files.QuantizePlan, *, dry_run: bool, as_json: bool) -> None:
    """Prints the plan that `quantize_files.quantize` returned."""
    sizes = {"before": plan.before, "after": plan.after}
    if as_json:
        weights = {name: {"qtype": q.qtype, "shape": q.shape, "bytes": q.nbytes} for name, q in plan.weights.items()}
        shards = {name: [t for piece in pieces for t in piece.tensors] for name, pieces in plan.layout.shards.items()}
        rest = {
            "floats": plan.floats,
            "skipped": plan.skipped,
            "notes": plan.notes,
            "left_out": plan.left_out,
            "links": plan.links,
            "shards": shards,
            "written": not dry_run,
        }
        click.echo(json.dumps({"weights": weights, **sizes, **rest}, indent=2))
        return
    if dry_run:
        becomes = {name: (q.scheme, str(tuple(q.shape)), q.nbytes) for name, q in plan.weights.items()}
        rows = [(label, becomes[names[0]][1], names) for label, names in folded(becomes).items()]
        for scheme in dict.fromkeys(what for what, _, _ in becomes.values()):
            _say(f"to {scheme}:")
            for label, shape, names in rows:
                if becomes[names[0]][0] == scheme:
                    _say(f"  {label}  {shape}, {in_bytes(sum(becomes[n][2] for n in names))}")
    _say(f"{_some(len(plan.weights), 'weight')} quantized, {_some(len(plan.floats), 'tensor')} as they are")
    for told, form in ((plan.skipped, "{} stays in float: {}"), (plan.notes, "{}: {}")):
        for label, names in folded(told).items():
            _say(form.format(label, told[names[0]]))
    if plan.left_out:
        _say(f"not taken over: {', '.join(plan.left_out)}")
    for name, place in plan.links.items():
        _say(f"{name} is a link: what was taken is {place}")
    verb = "would be written" if dry_run else "written"
    _say(
        f"{in_bytes(plan.before)} -> {in_bytes(plan.after)}, {_some(len(plan.layout.shards), 'file')} of tensors {verb}"
    )


@contextlib.contextmanager
def _progress(*, counted: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error: bytes and their rate (or tensors, if they are ``counted``, and the time), time left."""
    amount = (
        (rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn())
        if counted
        else (rich.progress.DownloadColumn(binary_units=True), rich.progress.TransferSpeedColumn())
    )
    columns = (
        rich.progress.BarColumn(),
        *amount,
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.description}", markup=False),
    )
    bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True)
    task = bar.add_task("", total=None)

    def update(done: int, total: int, name: str) -> None:
        bar.start()  # all checks have passed
        bar.update(task, completed=done, total=total, description=printable(name)[-40:])

    try:
        yield update
    finally:
        bar.stop()


# -- convert and compare -----------------------------------------------------------------------------------------------


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--to", "format", type=click.Choice([*FORMATS, "gguf", "native"]), required=True, help="Layout of the result."
)
@click.option("--architecture", help="With gguf, llama.cpp's name of the model's architecture.  [from the source]")
def convert(source: Path, destination: Path, format: str, architecture: str | None) -> None:
    """Write a checkpoint in another layout, with the same codes.

    Where the other layout has no place for a weight's codes, scales or zero points, it is refused by name, before
    anything is written. Where it cannot say how activations are quantized, a note says so. One tensor at a time is in
    memory. DESTINATION must not exist; it appears when it is complete.
    """
    with refusals(), _progress(counted=True) as progress:
        notes = files.convert(source, destination, format, architecture=architecture, progress=progress)
    _say(f"{destination}: {format}")
    for note in notes:
        _say(f"note: {note}.")


@main.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Compare the values of two checkpoints, weight by weight.

    Ends with code 0 if all values are equal and with code 3 if they are not, or if one has tensors the other has not.
    """
    with refusals(), _progress(counted=True) as progress:
        result = files.compare(first, second, progress=progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        rows = [(r.name, r.first, r.second, f"{r.largest:.3g}", f"{r.relative:.3g}") for r in result.tensors]
        _print(("tensor", "first", "second", "largest error", "relative error"), rows)
        for name in result.only_first:
            _say(f"only in {first}: {name}")
        for name in result.only_second:
            _say(f"only in {second}: {name}")
        _say("equal" if result.equal else "different")
    if not result.equal:
        raise SystemExit(3)


main.add_command(commands.generate)
main.add_command(commands.eval_)
