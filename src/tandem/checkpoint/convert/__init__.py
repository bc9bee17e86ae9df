"""Conversion of weights between Hugging Face folders and Megatron-Core checkpoints in any layout."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tandem.checkpoint.convert.adapter import Merged
from tandem.checkpoint.convert.architecture import REWARD_HEAD, Architecture, architecture, read_config
from tandem.checkpoint.convert.companions import copy_companions, write_arguments
from tandem.checkpoint.convert.experts import Experts
from tandem.checkpoint.convert.hugging_face import HuggingFace, write_hugging_face
from tandem.checkpoint.convert.layout import Layout, check_divides, stages
from tandem.checkpoint.convert.megatron import Megatron, check_types, write_megatron
from tandem.checkpoint.convert.ranks import is_megatron, open_ranks
from tandem.checkpoint.convert.source import Cast, Source, size_in_bytes
from tandem.checkpoint.disk import free_bytes
from tandem.checkpoint.export import put
from tandem.errors import ConfigError, RunError

FORMATS = ("hf", "megatron")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMPLEMENTATIONS = ("local", "transformer_engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The layout that is asked for, before the model is known; the defaults are one rank."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    layers_per_stage: str | None = None
    expert_parallel: int = 1
    expert_tensor_parallel: int | None = None
    pad_vocab_multiple: int = 1
    transformer_impl: str = "local"
    grouped_experts: bool = False

    @property
    def experts(self) -> Experts:
        if not self.grouped_experts:
            return Experts.APART
        return Experts.FUSED if self.transformer_impl == "local" else Experts.GROUPED

    def layout(self, model: Architecture) -> Layout:
        layers = model.layers, self.pipeline_parallel, self.virtual_pipeline
        unit = self.pad_vocab_multiple * self.tensor_parallel
        made = Layout(
            tensor=self.tensor_parallel,
            stages=stages(*layers, _numbers(self.layers_per_stage)),
            expert=self.expert_parallel,
            expert_tensor=self.expert_tensor_parallel or self.tensor_parallel,
            vocabulary=-(-model.vocabulary // unit) * unit,
            fused_norms=self.transformer_impl == "transformer_engine",
            experts=self.experts,
        )
        check_divides(model, made)
        return made


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_pipeline: int = 1,
    layers_per_stage: str | None = None,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
    pad_vocab_multiple: int = 1,
    transformer_impl: str = "local",
    grouped_experts: bool = False,
    dtype: str | None = None,
    lora: Path | None = None,
    config: Path | None = None,
    shard_gb: float = 4.0,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the weights of `source` to the new folder `target`, as `hf` or `megatron`; returns its real path.

    `source` is a Hugging Face folder with safetensors, or a Megatron-Core checkpoint with one file per rank, whose
    layout is found by itself; `config` is where config.json and tokenizer are, if not there. `layers_per_stage` is
    like `7,9`; `virtual_pipeline` counts the chunks of a stage; `expert_tensor_parallel` is `tensor_parallel` unless
    given. `dtype` is fp32, bf16 or fp16, else every tensor keeps its own. `lora` is a PEFT adapter to merge. `say` gets
    lines of progress.

    `ConfigError` before anything is written for arguments or weights that do not fit; `RunError` for a disk that
    fails. `target` appears whole or not at all.
    """
    cut = Cut(
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        virtual_pipeline=virtual_pipeline,
        layers_per_stage=layers_per_stage,
        expert_parallel=expert_parallel,
        expert_tensor_parallel=expert_tensor_parallel,
        pad_vocab_multiple=pad_vocab_multiple,
        transformer_impl=transformer_impl,
        grouped_experts=grouped_experts,
    )
    _check_arguments(source, target, to, cut, dtype, shard_gb)
    origin = _origin(source, config)
    with ExitStack() as files:
        weights, model, described = _open(source, origin, files, say)
        weights = weights if lora is None else Merged(weights, lora)
        weights = weights if dtype is None else Cast(weights, DTYPES[dtype])
        kept = weights.dtype("model.layers.0.self_attn.q_proj.weight")
        layout = _layout(cut, weights, model, say) if to == "megatron" else None
        _check_space(weights, target)

        def write(folder: Path) -> None:
            copy_companions(origin, folder, model, kept)
            if layout is None:
                return write_hugging_face(weights, model, folder, int(shard_gb * 2**30), say)
            write_megatron(weights, model, layout, folder, say)
            write_arguments(folder, described, model, layout, kept)

        return put(write, target)


def _layout(cut: Cut, weights: Source, model: Architecture, say: Callable[[str], None]) -> Layout:
    layout = cut.layout(model)
    check_types(weights, model, layout)
    say(f"writing Megatron-Core: {layout.in_words()}")
    return layout


def _open(
    source: Path, origin: Path, files: ExitStack, say: Callable[[str], None]
) -> tuple[Source, Architecture, Any]:
    """The weights, checked to be complete, their architecture and Transformers config."""
    config = read_config(origin)
    if not is_megatron(source):
        folder = HuggingFace(source, files)
        model = architecture(config, reward=REWARD_HEAD in folder.shapes)
        folder.check(model)
        return folder, model, config
    ranks = open_ranks(source)
    model = architecture(config, reward=ranks.reward)
    weights = Megatron(ranks, model)
    say(f"reading {ranks.folder}: {weights.layout.in_words()}")
    weights.warn_of_unequal_copies()
    return weights, model, config


def _origin(source: Path, config: Path | None) -> Path:
    """The folder with config.json and tokenizer: as given, or beside the weights or above them."""
    places = [source, source.parent] if config is None else [config]
    for place in places:
        if (place / "config.json").is_file():
            return place
    advice = "give the Hugging Face model's folder with --config" if config is None else "give another folder"
    raise ConfigError(f"{places[0]} has no config.json; {advice}")


def _check_arguments(
    source: Path, target: Path, to: str, cut: Cut, dtype: str | None, shard_gb: float
) -> None:
    choices = (("--to", to, FORMATS), ("--transformer-impl", cut.transformer_impl, IMPLEMENTATIONS))
    if dtype is not None:
        choices += (("--dtype", dtype, tuple(DTYPES)),)
    for flag, value, allowed in choices:
        if value not in allowed:
            raise ConfigError(f"{flag} {value!r} is not one of {', '.join(allowed)}")
    for name, value in asdict(cut).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    if to == "hf" and cut != Cut():
        raise ConfigError(
            "--to hf makes one model without ranks: leave out the layout, it is for --to megatron"
        )
    if not 0 < shard_gb < math.inf:
        raise ConfigError(f"--shard-gb {shard_gb:g} must be above 0 and finite")
    if not source.is_dir():
        raise ConfigError(f"{source} does not exist or is not a folder; give a model's folder")
    if said := _no_weights(source):
        raise ConfigError(f"{source} is {said}")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ConfigError(f"{target} exists; give a path that is not there yet")


def _no_weights(source: Path) -> str:
    """What a folder is that a model belongs to and that is none, and what to give; empty for any other."""
    if (source / "config.json").is_file():
        return ""
    if (source / "adapter_config.json").is_file():
        return f"an adapter: give its model's folder as SOURCE, with --lora {source}"
    run, checkpoint = (source / "config.yaml").is_file(), (source / "manifest.json").is_file()
    if not run:
        return ""
    what = "a run's checkpoint" if checkpoint else "a run"
    if (source / "model" / "config.json").is_file():
        return f"{what}: its model is {source / 'model'}"
    return f"{what} and holds no model folder: write one with tandem export {source} TARGET, and give that"


def _check_space(weights: Source, target: Path) -> None:
    """A little less than will be written: what several ranks hold counts once."""
    need = sum(size_in_bytes(weights, name) for name in weights.shapes)
    free = free_bytes(target.resolve().parent)
    if need > free:
        raise RunError(
            f"{target} needs at least {need:,} bytes, and {free:,} are free there; free some space"
        )


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers-per-stage {text!r} is not a list of numbers like 7,9") from None
