"""Commands about models: generate, chat, eval, export, convert."""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.options import (
    Debug,
    Device,
    MaxTokens,
    MinP,
    Model,
    Overrides,
    Temperature,
    TopK,
    TopP,
    Trust,
    plain_console,
)
from tandem.cli.runs import recipe_file
from tandem.libraries import import_libraries


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
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Answer prompts with a model."""
    if not prompts and file is None:
        raise typer.BadParameter("give a PROMPT, or --file with one per line")
    import_libraries()
    from tandem.talk import generate as generation
    from tandem.talk.place import locate
    from tandem.talk.speaker import open_speaker

    place = locate(model)
    every = [*(prompts or []), *(generation.read_prompts(file) if file is not None else [])]
    speaker = open_speaker(place, device, raw=raw, trust=trust_remote_code)
    params = speaker.params(max_tokens, temperature, top_p, top_k, min_p)
    alone = len(every) * n == 1
    for reply in generation.generate(speaker, every, params, answers=n, seed=seed):
        typer.echo(reply.as_json() if json else reply.as_text(alone=alone))


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
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Talk with a model.

    `clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer.
    """
    import_libraries()
    from tandem.talk.chat import Chat, converse
    from tandem.talk.place import locate
    from tandem.talk.speaker import open_speaker

    speaker = open_speaker(locate(model), device, trust=trust_remote_code)

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


def evaluate(
    model: Model,
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe with the questions and the reward, for a model without a run.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write figures and settings to this file.")] = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure a model on held-out questions, as during its training."""
    import_libraries()
    from tandem.device import pick
    from tandem.talk.evaluate import measure, settings_of
    from tandem.talk.place import locate
    from tandem.talk.speaker import open_model

    place = locate(model)
    run = settings_of(place, None if recipe is None else recipe_file(recipe), overrides or [])
    place = replace(place, run=run)
    console = plain_console()
    with console.status("answering"):
        result = measure(run, open_model(place, pick(run.device), trust_remote_code), model)
    if json is not None:
        result.write(json)
    if run.journal.samples:
        console.print(result.table(run.journal.samples))
    typer.echo(result.sentence())


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or one of its checkpoints.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="Folder to write; an older export there is replaced.")
    ],
    debug: Debug = False,
) -> None:
    """Write the newest checkpoint's model as a Hugging Face folder, also while the run goes on."""
    import_libraries()
    from tandem.checkpoint.extract import extract

    typer.echo(f"written: {extract(source, target)}")


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
    expert_tensor_parallel: Annotated[
        int | None, typer.Option(help="Ranks that share the matrices of an expert; else the tensor ranks.")
    ] = None,
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
    import_libraries()
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
        expert_tensor_parallel=expert_tensor_parallel,
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
