"""The command line. Commands import what they need when they run: `tandem --help` must not wait for torch."""

from typing import Annotated

import typer

from tandem import __version__
from tandem.cli import models, runs
from tandem.commands import Commands


def show_version(value: bool) -> None:
    if value:
        typer.echo(f"tandem {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    name="tandem",
    help="Post-train language models with reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(runs.train)
app.command()(runs.show)
app.command()(runs.explain)
app.command()(runs.check)
app.command()(runs.plan)
app.command()(models.generate)
app.command()(models.chat)
app.command(name="eval")(models.evaluate)
app.command()(models.export)
app.command()(models.convert)


@app.callback()
def tandem(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Post-train language models with reinforcement learning."""


def main() -> None:
    """Entry point of the `tandem` command."""
    app()
