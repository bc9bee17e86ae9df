"""Commands about runs: train, and what looks at a recipe before."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tandem.cli.options import Debug, Overrides, Recipe, plain_console
from tandem.commands import FAILURE
from tandem.errors import ConfigError

if TYPE_CHECKING:
    from tandem.config import Run
    from tandem.train.finding import Finding
from tandem.libraries import import_libraries


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an earlier run in the folder aside and begin anew.")
    ] = False,
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="Resume with a configuration that was changed.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train as a recipe says, or go on where its run stopped."""
    run = resolved(recipe, overrides)
    command = shlex.join([recipe, *(overrides or [])])
    if not fresh and say_if_finished(run, recipe, overrides or [], allow_config_change):
        return
    import_libraries()
    from tandem.train.run import Launch
    from tandem.train.run import train as train_run

    launch = Launch(
        recipe=command, fresh=fresh, allow_config_change=allow_config_change, console=plain_console()
    )
    train_run(run, launch)


def show(recipe: Recipe, overrides: Overrides = None, debug: Debug = False) -> None:
    """Print the configuration of a recipe, every key spelled out."""
    from tandem.config import dump

    run = resolved(recipe, overrides)
    typer.echo(f"# {run.arithmetic()}\n{dump(run)}", nl=False)


def explain(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="A key or section; none for the list of sections.")
    ] = "",
    debug: Debug = False,
) -> None:
    """Say what a key of the configuration means and takes."""
    from tandem.config import explain as explain_key

    typer.echo(explain_key(key))


def check(recipe: Recipe, overrides: Overrides = None, debug: Debug = False) -> None:
    """Look, in seconds, for everything that could go wrong in a run."""
    from tandem.train.finding import Finding

    began = time.monotonic()
    try:
        run = resolved(recipe, overrides)
    except ConfigError as error:
        report(Finding(status="problem", name="keys", text=str(error), seconds=time.monotonic() - began))
        raise typer.Exit(FAILURE) from error
    report(Finding(status="ok", name="keys", text=run.arithmetic(), seconds=time.monotonic() - began))
    import_libraries()
    from tandem.train.check import check as check_run

    problems = 0
    for finding in check_run(run):
        report(finding)
        problems += finding.status == "problem"
    if problems:
        typer.echo(f"{problems} problem{'s' * (problems > 1)}: the run would not go well")
        raise typer.Exit(FAILURE)
    typer.echo(f"no problem found; start with: tandem train {shlex.join([recipe, *(overrides or [])])}")


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    device: Annotated[
        str,
        typer.Option(
            help="h200, h100, b200, a100, l40s, cpu (measured here), or FLOPS=..,BANDWIDTH=..,MEMORY=.."
        ),
    ] = "h200",
    count: Annotated[int, typer.Option(min=1, help="Devices.")] = 8,
    per_node: Annotated[int, typer.Option(min=1, help="Devices in a node.")] = 8,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens of a prompt; data.max_prompt_tokens unless given.")
    ] = None,
    answer: Annotated[
        int | None,
        typer.Option(min=1, help="Mean tokens of an answer; sampling.max_answer_tokens unless given."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 5,
    debug: Debug = False,
) -> None:
    """Estimate memory and time of a run on devices that are not there: which layouts fit, and the fastest.

    The model's config.json is enough; no weight is read.
    """
    run = resolved(recipe, overrides)
    import_libraries()
    from tandem.train.plan.request import planned

    typer.echo(
        planned(run, device=device, count=count, per_node=per_node, prompt=prompt, answer=answer, top=top)
    )


def resolved(recipe: str, overrides: list[str] | None) -> "Run":
    from tandem.config import load

    return load(recipe_file(recipe), overrides or [])


def recipe_file(recipe: str) -> str:
    """A path as it is; a bare name that is no file is that of a recipe that comes along."""
    from tandem.config import recipes

    packaged = recipes() / "runs" / f"{recipe}.yaml"
    is_name = Path(recipe).name == recipe and not Path(recipe).exists()
    return str(packaged) if is_name and packaged.is_file() else recipe


def say_if_finished(run: "Run", recipe: str, overrides: list[str], allow_config_change: bool) -> bool:
    """Nothing is left to do: all steps are done and the model is exported. What is changed since is named."""
    from tandem.checkpoint import newest, read_manifest
    from tandem.config import difference, load
    from tandem.journal import exported_step

    folder = Path(run.run_dir)
    if not (folder / "model" / "config.json").is_file():
        return False
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None or (done := read_manifest(checkpoint).step) < run.steps:
        return False
    if (exported := exported_step(folder)) is None or exported < done:
        return False
    trained = load(checkpoint / "config.yaml")
    if difference(trained, run) and not allow_config_change:
        return False
    changed = difference(trained, run, free=("run_dir", "steps"))
    more = max(2 * done, 1)
    command = shlex.join([recipe, *(text for text in overrides if not text.startswith("steps="))])
    typer.echo(
        f"{folder} is finished: {done} of {run.steps} steps are done, the model is in {folder / 'model'}\n"
        + "".join(f"  not used, for no step is left: {change}\n" for change in changed)
        + f"  tandem train {command} steps={more}   # go on\n"
        f"  tandem train {command} --fresh   # begin anew; this run is set aside\n"
        f"  tandem chat {shlex.quote(str(folder))}"
    )
    return True


def report(finding: "Finding") -> None:
    """One line, its status in colour on a terminal."""
    from tandem.journal import visible

    colours = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}
    status = typer.style(f"{finding.status:<8}", fg=colours[finding.status])
    typer.echo(
        f"{status} {finding.seconds:5.2f} s  {finding.name:<10}  {''.join(map(visible, finding.text))}"
    )
