"""Options that several commands have, and what each does first."""

from math import isfinite
from typing import TYPE_CHECKING, Annotated

import typer

from tandem.commands import remember_debug

if TYPE_CHECKING:
    from rich.console import Console


def plain_console() -> "Console":
    """Long lines are left whole where they are not shown on a terminal."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False)


def above_zero(value: float) -> float:
    if not value > 0:
        raise typer.BadParameter(
            f"{value:g} leaves no token to sample; give a number above 0, or 1 for all tokens"
        )
    return value


def finite(value: float) -> float:
    if not isfinite(value):
        raise typer.BadParameter(f"{value:g} divides nothing; give a number, or 0 for greedy answers")
    return value


Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that comes along.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values above those of the file: section.key=value."),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks (or TANDEM_DEBUG=1).", callback=remember_debug)
]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder of a run or of a Hugging Face model.", show_default=False),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Divides the logits; 0 is greedy.", callback=finite)
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
TopP = Annotated[
    float, typer.Option(max=1.0, help="Sample among tokens of this much probability.", callback=above_zero)
]
TopK = Annotated[int, typer.Option(min=0, help="Sample among so many tokens; 0 for all.")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the likeliest.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's folder brings along.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, or a device by name.")]
