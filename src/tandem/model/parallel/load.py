"""Build a model straight into a layout: no process ever holds more of it than its part."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tandem.config.sections import Lora, Model
from tandem.errors import ConfigError
from tandem.model.attention import NAME
from tandem.model.language_model import LanguageModel
from tandem.model.load import (
    DTYPES,
    REFERENCE_KEY,
    check_speaks,
    describe,
    existing,
    load_tokenizer,
    with_adapter,
    without_dropout,
)
from tandem.model.mixture import apart, as_saved, experts_first
from tandem.model.new import new_network
from tandem.model.parallel.expert import first_row
from tandem.model.parallel.fit import check_adapter
from tandem.model.parallel.folder import adapter_key
from tandem.model.parallel.grid import Grid
from tandem.model.parallel.mesh import local
from tandem.model.parallel.model import ShardedModel
from tandem.model.parallel.pipeline import PipelinedModel
from tandem.model.parallel.shard import on_grid

if TYPE_CHECKING:
    from peft import PeftModel


def load_sharded(
    config: Model,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    *,
    seed: int = 0,
    where: str = "learner.layout",
    start: Path | None = None,
) -> ShardedModel:
    """The policy on the processes of a grid, with the weights that `LanguageModel.save` wrote into `start` if given;
    `where` is the layout's key, for errors. Collective."""
    dtype = DTYPES[config.dtype]
    if config.new is not None:
        network, source = new_network(config.new, tokenizer, seed).to(dtype), "model.new"
    else:
        source = existing(config.path)
        network = empty_network(source, dtype, config.trust_remote_code)
    module = adapted(network, config.lora, seed) if config.lora is not None else network
    check_adapter(grid.layout, config.lora, where)
    model = kind_of(grid)(module, tokenizer, source, grid, where)
    if config.new is None:
        read_weights(model, Path(downloaded(source)))
    if start is not None:
        read_saved(model, start)
    model.check_forward()
    return model


def load_frozen_sharded(
    path: str, dtype: str, grid: Grid, *, trust_remote_code: bool = False, where: str = "reference.layout"
) -> ShardedModel:
    """A model that is only read, on the processes of a grid. Collective."""
    source = existing(path, REFERENCE_KEY)
    network = empty_network(source, DTYPES[dtype], trust_remote_code).requires_grad_(False).eval()
    model = kind_of(grid)(network, load_tokenizer(source, trust_remote_code), source, grid, where)
    read_weights(model, Path(downloaded(source)))
    model.check_forward()
    return model


def kind_of(grid: Grid) -> type[ShardedModel]:
    return ShardedModel if grid.pipeline.size == 1 else PipelinedModel


def adapted(network: PreTrainedModel, lora: Lora, seed: int) -> "PeftModel":
    """With an adapter whose numbers are real, and those that one process would draw.

    PEFT moves adapters to where the weights are, so weights without storage are in host memory meanwhile, as views of
    a single number.
    """
    weights = [weight for weight in network.parameters() if weight.is_meta]
    bare = [nn.Parameter(weight.new_empty((), device="cpu").expand(weight.shape)) for weight in weights]
    for weight, other in zip(weights, bare):
        torch.utils.swap_tensors(weight, other)
    module = with_adapter(network, lora, seed, None)
    for weight, other in zip(weights, bare):
        other.requires_grad_(weight.requires_grad)
        torch.utils.swap_tensors(weight, other)
    return module


def empty_network(source: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture of a Hugging Face folder; its weights have shapes but no storage, its buffers are real."""
    config = describe(source, trust_remote_code)
    check_speaks(config, source)
    with init_empty_weights(include_buffers=False):
        network = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=NAME, trust_remote_code=trust_remote_code
        )
    settings = Path(downloaded(source)) / "generation_config.json"
    if settings.is_file():
        network.generation_config = GenerationConfig.from_pretrained(settings.parent)
    return without_dropout(network)


def downloaded(source: str) -> str:
    """The folder of a model that is named by its folder or by its name on the hub."""
    if Path(source).is_dir():
        return source
    return snapshot_download(source, allow_patterns=["*.json", "*.safetensors"])


def read_weights(model: ShardedModel, folder: Path, optional: frozenset[str] = frozenset()) -> None:
    """Fill the weights that no adapter brings from a folder's safetensors; only this process's slices are read.
    Those named in `optional` stay as they are where the folder lacks them."""
    targets = {}
    for name, weight in model.module.named_parameters():
        if ".lora_" in name:
            continue
        here, first = local(weight), first_row(weight, model.parts[name], model.grid)
        for key, values in apart(model.network.config.model_type, model.hf_name(name), here, first):
            targets[key] = Target(name, weight, values, whole=values is not here)
    if optional:
        there = tensors_in(folder)
        targets = {key: target for key, target in targets.items() if key in there or key not in optional}
    read(model, targets, folder)


def tensors_in(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Of a folder's safetensors, by name; only headers are read."""
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def read_saved(model: ShardedModel, folder: Path) -> None:
    """Fill the weights that `LanguageModel.save` wrote: all, or those of the adapter."""
    if model.adapter is not None:
        return read(model, adapter_targets(model), folder)
    read_weights(model, folder)


class Target(NamedTuple):
    """What a tensor of a file is read into."""

    name: str
    weight: Tensor
    """The parameter that it is, or belongs to."""
    values: Tensor
    """What is here of it, or of what belongs to it."""
    whole: bool = False
    """The tensor of the file is here whole: of a model in one process, or one of several that make up the
    parameter."""


def target(model: LanguageModel, name: str, values: Tensor) -> Target:
    """`values` is what is here of the parameter of this name, or of what belongs to it."""
    weight = model.module.get_parameter(name)
    return Target(name, weight, values.detach(), whole=not isinstance(model, ShardedModel))


def adapter_targets(model: LanguageModel) -> dict[str, Target]:
    """The weights of an adapter, by their names in its file."""
    return {adapter_key(n): target(model, n, local(weight)) for n, weight in model.trainable().items()}


def read(model: LanguageModel, targets: Mapping[str, Target], folder: Path) -> None:
    """Read this process's slices of the tensors of a folder, by the name they have there, whatever layout wrote
    them; ConfigError where one is missing or has another shape. Of adapters on experts, which one process has in
    another form than many, a tensor that is in the other form is read whole."""
    saved = tensors_in(folder)
    missing = sorted(set(targets) - set(saved))
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} weights: {', '.join(missing[:5])}; use a whole folder"
        )
    turned = {key: target for key, target in targets.items() if _is_turned(key, target, saved[key].size)}
    for key, target in turned.items():
        whole = torch.empty(saved[key].size, dtype=saved[key].properties.dtype)
        read_alone({key: whole}, folder)
        _turn(model, key, target, whole)
    targets = {key: target for key, target in targets.items() if key not in turned}
    pieces = {
        key: target.values.cpu()
        if target.whole
        else on_grid(target.values, target.weight, model.parts[target.name], model.grid, host=True)
        for key, target in targets.items()
    }
    for key, piece in pieces.items():
        if saved[key].size != piece.shape:
            raise ConfigError(
                f"{folder}: {key} has shape {list(saved[key].size)} and the model needs {list(piece.shape)}; "
                "the weights belong to another config.json"
            )
    read_alone(pieces, folder)
    with torch.no_grad():
        for key, target in targets.items():
            read_in = local(pieces[key])
            if target.values.data_ptr() != read_in.data_ptr():
                target.values.copy_(read_in)


def _is_turned(key: str, target: Target, size: torch.Size) -> bool:
    """A factor of experts, which the file has in the form of one process and the model in that of many, or the other
    way round."""
    return ".experts." in key and ".lora_" in key and len(size) != target.weight.ndim


def _turn(model: LanguageModel, key: str, target: Target, whole: Tensor) -> None:
    """Put what is here of a factor of experts into its place. The forms differ in the order of numbers alone."""
    if target.weight.ndim == 3:
        whole = experts_first(key, whole, model.network.config.num_experts)
    else:
        whole = as_saved(key, whole)
    if not target.whole:
        first = first_row(target.weight, model.parts[target.name], model.grid)
        whole = whole[first : first + len(target.values)]
    if whole.shape != target.values.shape:
        raise ConfigError(
            f"{key} is for {list(whole.shape)} here and the model needs {list(target.values.shape)}; go on with the "
            "rank of the adapter that the checkpoint has"
        )
    with torch.no_grad():
        target.values.copy_(whole)


def read_alone(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, sharded ones with their slices, from a folder's safetensors, without the other processes."""
    with warnings.catch_warnings():
        # The library remarks that no process group takes part.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
