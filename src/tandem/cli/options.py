"""Options that several commands have, and what each does first."""

import atexit
import gc
import os
from typing import TYPE_CHECKING, Annotated

import typer

from tandem.commands import remember_debug

if TYPE_CHECKING:
    from rich.console import Console


def import_libraries() -> None:
    """Import what every command with a model needs, without progress bars (but for downloads) or advice from below.
    Once in a process."""
    if gc.get_freeze_count():
        return
    # Set by hand, or it warns at every new process; none of ours goes on in a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait for each other spin only briefly: beside another busy process, long spinning starves both.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Imports make a million objects that stay: to look for garbage among them, now or later, takes a fifth of the time.
    gc.disable()
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as advice

    advice.set_verbosity_error()
    advice.disable_progress_bar()
    enable_progress_bars()
    import tandem.model  # noqa: F401

    gc.freeze()
    gc.enable()
    # Libraries that count what they made find it again when the process ends.
    atexit.register(gc.unfreeze)


def plain_console() -> "Console":
    """Long lines are left whole where they are not shown on a terminal."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False)


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
Temperature = Annotated[float, typer.Option(min=0.0, help="Divides the logits; 0 is greedy.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample among tokens of this much probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample among so many tokens; 0 for all.")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the likeliest.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's folder brings along.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, or a device by name.")]
