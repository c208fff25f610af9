"""The command line: ``jaxquant demo``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

try:
    import click
    import rich.console
except ModuleNotFoundError:
    raise SystemExit("jaxquant: the command line needs click and rich. Run: pip install 'jaxquant[cli]'") from None

from jaxquant import QuantError, __version__

__all__ = ["main"]


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


if __name__ == "__main__":
    main()
