"""The command line. Commands import what they need when they run: `tandem --help` must not wait for torch."""

import os
import secrets
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tandem import __version__
from tandem.commands import FAILURE, Commands, remember_debug
from tandem.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.config import Run
    from tandem.train.finding import Finding


def quiet_libraries() -> None:
    """No progress bars or advice from below, but for downloads, which take long."""
    # Set by hand, or it warns at every new process; none of ours goes on in a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait for each other spin only briefly: beside another busy process, long spinning starves both.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as advice

    advice.set_verbosity_error()
    advice.disable_progress_bar()
    enable_progress_bars()


def show_version(value: bool) -> None:
    if value:
        typer.echo(f"tandem {__version__}")
        raise typer.Exit


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
Device = Annotated[str, typer.Option(help="auto, cpu, or a device by name.")]

app = typer.Typer(
    cls=Commands,
    name="tandem",
    help="Post-train language models with reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def tandem(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Post-train language models with reinforcement learning."""


@app.command()
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
    quiet_libraries()
    from tandem.train.run import Launch
    from tandem.train.run import train as train_run

    launch = Launch(
        recipe=command, fresh=fresh, allow_config_change=allow_config_change, console=plain_console()
    )
    train_run(run, launch)


@app.command()
def show(recipe: Recipe, overrides: Overrides = None, debug: Debug = False) -> None:
    """Print the configuration of a recipe, every key spelled out."""
    from tandem.config import dump

    run = resolved(recipe, overrides)
    typer.echo(f"# {run.arithmetic()}\n{dump(run)}", nl=False)


@app.command()
def explain(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="A key or section; none for the list of sections.")
    ] = "",
    debug: Debug = False,
) -> None:
    """Say what a key of the configuration means and takes."""
    from tandem.config import explain as explain_key

    typer.echo(explain_key(key))


@app.command()
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
    quiet_libraries()
    from tandem.train.check import check as check_run

    problems = 0
    for finding in check_run(run):
        report(finding)
        problems += finding.status == "problem"
    if problems:
        typer.echo(f"{problems} problem{'s' * (problems > 1)}: the run would not go well")
        raise typer.Exit(FAILURE)
    typer.echo(f"no problem found; start with: tandem train {shlex.join([recipe, *(overrides or [])])}")


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to answer.")] = None,
    file: Annotated[Path | None, typer.Option(help="Text file with one more prompt per line.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Answers to each prompt.")] = 1,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal answers.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as they are, no template.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per answer.")] = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Answer prompts with a model."""
    if not prompts and file is None:
        raise typer.BadParameter("give a PROMPT, or --file with one per line")
    quiet_libraries()
    from tandem.talk import generate as generation
    from tandem.talk.place import locate
    from tandem.talk.speaker import open_speaker

    place = locate(model)
    every = [*(prompts or []), *(generation.read_prompts(file) if file is not None else [])]
    speaker = open_speaker(place, device, raw=raw)
    params = speaker.params(max_tokens, temperature, top_p, top_k, min_p)
    alone = len(every) * n == 1
    for reply in generation.generate(speaker, every, params, answers=n, seed=seed):
        typer.echo(reply.as_json() if json else reply.as_text(alone=alone))


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    history_turns: Annotated[int, typer.Option(min=0, help="Turns that the model is reminded of.")] = 8,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token always.")] = False,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, help="For equal answers; else they differ.")] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Talk with a model.

    `clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer.
    """
    quiet_libraries()
    from tandem.talk.chat import Chat, converse
    from tandem.talk.place import locate
    from tandem.talk.speaker import open_speaker

    speaker = open_speaker(locate(model), device)

    def say(text: str) -> None:
        typer.echo(text, nl=False)

    dialog = Chat(
        speaker,
        speaker.params(max_tokens, 0.0 if greedy else temperature, top_p, top_k, min_p),
        system=system,
        history_turns=history_turns,
        seed=secrets.randbits(32) if seed is None else seed,
        say=say,
        notice=lambda text: typer.echo(f"({text})"),
    )
    typer.echo("(`clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer)")
    converse(dialog, lambda: input("you> "))


@app.command(name="eval")
def evaluate(
    model: Model,
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe with the questions and the reward, for a model without a run.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write figures and settings to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Measure a model on held-out questions, as during its training."""
    from tandem.talk.place import locate

    place = locate(model)
    quiet_libraries()
    from tandem.device import pick
    from tandem.talk.evaluate import measure, settings_of
    from tandem.talk.speaker import open_model

    run = settings_of(place, None if recipe is None else recipe_file(recipe), overrides or [])
    place = replace(place, run=run)
    console = plain_console()
    with console.status("answering"):
        result = measure(run, open_model(place, pick(run.device)), model)
    if json is not None:
        result.write(json)
    if run.journal.samples:
        console.print(result.table(run.journal.samples))
    typer.echo(result.sentence())


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
    """Nothing is left to do: all steps are done and the model is exported, with this configuration."""
    from tandem.checkpoint import newest, read_manifest
    from tandem.config import difference, load

    folder = Path(run.run_dir)
    if not (folder / "model" / "config.json").is_file():
        return False
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None or (done := read_manifest(checkpoint).step) < run.steps:
        return False
    if difference(load(checkpoint / "config.yaml"), run) and not allow_config_change:
        return False
    more = max(2 * done, 1)
    command = shlex.join([recipe, *(text for text in overrides if not text.startswith("steps="))])
    typer.echo(
        f"{folder} is finished: {done} of {run.steps} steps are done, the model is in {folder / 'model'}\n"
        f"  tandem train {command} steps={more}   # go on\n"
        f"  tandem train {command} --fresh   # begin anew; this run is set aside\n"
        f"  tandem chat {folder}"
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


def plain_console() -> "Console":
    """Long lines are left whole where they are not shown on a terminal."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point of the `tandem` command."""
    app()


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Hugging Face folder or Megatron-Core checkpoint.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write, not there yet.")],
    to: Annotated[str, typer.Option(help="hf or megatron.")],
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share each matrix.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Stages that share the layers.")] = 1,
    virtual_pipeline: Annotated[int, typer.Option(help="Chunks of layers in a stage.")] = 1,
    layers_per_stage: Annotated[str | None, typer.Option(help="Uneven stages, as 7,9.")] = None,
    expert_parallel: Annotated[int, typer.Option(help="Ranks that share the experts.")] = 1,
    pad_vocab_multiple: Annotated[
        int, typer.Option(help="Pad the vocabulary to a multiple of this times the tensor ranks.")
    ] = 1,
    transformer_impl: Annotated[str, typer.Option(help="Names as in local or transformer_engine.")] = "local",
    grouped_experts: Annotated[
        bool, typer.Option("--grouped-experts", help="Experts of one grouped layer.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; else as stored.")] = None,
    lora: Annotated[Path | None, typer.Option(help="PEFT adapter to merge.")] = None,
    config: Annotated[Path | None, typer.Option(help="Folder with config.json and tokenizer.")] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest safetensors file.")] = 4.0,
    debug: Debug = False,
) -> None:
    """Convert weights between Hugging Face folders and Megatron-Core checkpoints."""
    quiet_libraries()
    from tandem.checkpoint.convert import convert as convert_weights

    written = convert_weights(
        source,
        target,
        to,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        virtual_pipeline=virtual_pipeline,
        layers_per_stage=layers_per_stage,
        expert_parallel=expert_parallel,
        pad_vocab_multiple=pad_vocab_multiple,
        transformer_impl=transformer_impl,
        grouped_experts=grouped_experts,
        dtype=dtype,
        lora=lora,
        config=config,
        shard_gb=shard_gb,
        say=typer.echo,
    )
    typer.echo(f"written: {written}")
