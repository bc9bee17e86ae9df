"""Checkpoints of a model on many processes: each writes its part, and any other layout reads them, one process too.

`weights/` holds what trains (all weights by the names that Transformers' model has for them, or an adapter's),
`optimizer/` the moments and the master weights where the model's are shorter, `settings/` the rest of a Hugging Face
folder. The tensors are safetensors that torch.distributed.checkpoint writes and reads, the place of each piece in its
file's header; nothing in them is code. What one process wrote, a model's folder and `optimizer_tensors` in a file, is
read by the same slices; only adapters on experts, which one process has in another form, are read whole, a factor at a
time.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

from tandem.checkpoint.export import export
from tandem.checkpoint.jsonfile import read_json, write_json
from tandem.engine.weights import named_tensors
from tandem.model import LanguageModel
from tandem.model.mixture import apart, as_saved
from tandem.model.parallel.folder import ADAPTER, FILE_BYTES, write_settings, write_weights
from tandem.model.parallel.load import (
    Target,
    adapter_targets,
    read,
    read_alone,
    read_saved,
    target,
    tensors_in,
)
from tandem.model.parallel.mesh import local
from tandem.model.parallel.model import ShardedModel
from tandem.model.parallel.shard import on_grid
from tandem.optimizer import Optimizer

WEIGHTS, OPTIMIZER, SETTINGS, STATE = "weights", "optimizer", "settings", "optimizer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "state/step/"
"""Before a weight's name in the file of one process: how many steps it has had."""


class Keys(NamedTuple):
    """What tensors of an optimizer are called in a file."""

    moment: str
    master: str


MANY = Keys("{moment}/{name}", "master/{name}")
ONE = Keys("state/{moment}/{name}", "{name}")
"""As `optimizer_tensors` names moments; masters by the weight's own name."""


def write_sharded(folder: Path, model: ShardedModel, optimizer: Optimizer) -> None:
    """Write this process's part below `folder`, which all processes must see. All call it in step."""
    _write(folder / WEIGHTS, model, _weights(model))
    steps = {
        name: float(optimizer.adamw.state[master]["step"])
        for name, master in optimizer.masters.items()
        if optimizer.adamw.state.get(master)
    }
    _write(folder / OPTIMIZER, model, _state(model, optimizer, steps, MANY))
    steps = model.grid.over_stages(steps)
    if dist.get_rank() == 0:
        write_settings(folder / SETTINGS, model)
        if model.adapter is not None:
            model.adapter.save_pretrained(folder / SETTINGS)
        write_json(folder / STATE, {"updates": optimizer.updates, "steps": steps})
    dist.barrier()


def read_weights(folder: Path, model: LanguageModel) -> None:
    """Bring a model to what any number of processes wrote; each reads its slices only."""
    read(model, _weights(model), folder / WEIGHTS)


def read_sharded(folder: Path, model: LanguageModel, optimizer: Optimizer) -> None:
    """As `read_weights`, with the optimizer."""
    figures = read_json(folder / STATE)
    read_weights(folder, model)
    _read_optimizer(folder / OPTIMIZER, model, optimizer, figures["steps"], MANY)
    optimizer.updates = figures["updates"]


def read_model(folder: Path, model: LanguageModel) -> None:
    """Bring a model to the weights that `LanguageModel.save` wrote; each process reads its slices only."""
    if isinstance(model, ShardedModel):
        return read_saved(model, folder)
    read(model, {key: Target(key, t, t, whole=True) for key, t in named_tensors(model).items()}, folder)


def read_whole(file: Path, model: LanguageModel, optimizer: Optimizer) -> None:
    """Bring an optimizer to what one process wrote: the tensors of `optimizer_tensors` in `file`, masters in files
    beside it."""
    with safe_open(file, framework="pt") as opened:
        names = [key for key in opened.keys() if key.startswith(STEP)]  # noqa: SIM118
        steps = {name.removeprefix(STEP): float(opened.get_tensor(name)) for name in names}
    _read_optimizer(file.parent, model, optimizer, steps, ONE)


def _read_optimizer(
    folder: Path, model: LanguageModel, optimizer: Optimizer, steps: Mapping[str, float], keys: Keys
) -> None:
    """`steps` are those of each weight, by its name. Masters that the folder lacks were the weights themselves, which
    have to be restored before."""
    masters = optimizer.masters
    optimizer.adamw.state.clear()
    steps = {name: step for name, step in steps.items() if name in masters}
    for name, step in steps.items():
        master = masters[name]
        # The step count stays in host memory unless the kernel reads it.
        device = master.device if optimizer.adamw.defaults["fused"] else torch.device("cpu")
        optimizer.adamw.state[master] = {
            "step": torch.tensor(step, dtype=torch.float32, device=device),
            **{moment: torch.zeros_like(master, requires_grad=False) for moment in MOMENTS},
        }
    optimizer.restore_masters({})
    there = tensors_in(folder) if folder.is_dir() else {}
    lacking = {keys.master.format(name=name) for name in optimizer.master_tensors} - there.keys()
    targets = _state(model, optimizer, steps, keys)
    if targets.keys() - lacking:
        read(model, {key: target for key, target in targets.items() if key not in lacking}, folder)


def export_sharded(folder: Path, target: Path, file_bytes: int = FILE_BYTES) -> Path:
    """One Hugging Face folder (of an adapter, its PEFT folder) from a checkpoint, in one process and without its
    layout; returns the real path. Its files are of at most `file_bytes`, but that PEFT reads one file only."""

    def write(place: Path) -> None:
        shutil.copytree(folder / SETTINGS, place, dirs_exist_ok=True)
        whole = _whole(folder / WEIGHTS)
        if (place / "adapter_config.json").is_file():
            write_weights(place, ((name, as_saved(name, weight)) for name, weight in whole), sys.maxsize)
            (place / "config.json").unlink()
            (place / "model.safetensors").rename(place / ADAPTER)
        else:
            family = read_json(place / "config.json")["model_type"]
            views = (view for name, weight in whole for view in apart(family, name, weight))
            write_weights(place, views, file_bytes)

    return export(write, target)


def _weights(model: LanguageModel) -> dict[str, Target]:
    """What trains, by its name in the files."""
    if model.adapter is not None:
        return adapter_targets(model)
    named = model.module.named_parameters()
    return {model.hf_name(n): target(model, n, local(weight)) for n, weight in named}


def _state(model: LanguageModel, optimizer: Optimizer, names: Iterable[str], keys: Keys) -> dict[str, Target]:
    """Moments of the given weights, and all masters that are not the weights themselves."""
    masters = optimizer.masters
    found = {
        keys.moment.format(moment=moment, name=name): target(
            model, name, optimizer.adamw.state[masters[name]][moment]
        )
        for moment in MOMENTS
        for name in names
    }
    return found | {
        keys.master.format(name=name): target(model, name, values)
        for name, values in optimizer.master_tensors.items()
    }


def _write(folder: Path, model: ShardedModel, targets: dict[str, Target]) -> None:
    pieces = {
        key: on_grid(target.values, target.weight, model.parts[target.name], model.grid, host=True)
        for key, target in targets.items()
    }
    if pieces:
        save(pieces, storage_writer=HuggingFaceStorageWriter(path=str(folder), save_distributed=True))


def _whole(folder: Path, batch_bytes: int = 2**30) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder of pieces, so many bytes of them in memory at a time."""
    saved = tensors_in(folder)
    batch: dict[str, Tensor] = {}
    for name in sorted(saved):
        batch[name] = torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
        if sum(tensor.nbytes for tensor in batch.values()) >= batch_bytes:
            read_alone(batch, folder)
            yield from batch.items()
            batch = {}
    if batch:
        read_alone(batch, folder)
        yield from batch.items()
