"""``python -m jaxquant``: the command line."""

from jaxquant.cli import main

main(prog_name="python -m jaxquant")
