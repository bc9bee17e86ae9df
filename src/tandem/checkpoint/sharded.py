"""Checkpoints of a model on many processes: each writes its part, and any other layout reads them.

`weights/` holds what trains (all weights by their Hugging Face names, or an adapter's), `optimizer/` the moments and
the master weights where the model's are shorter, `settings/` the rest of a Hugging Face folder. The tensors are
safetensors that torch.distributed.checkpoint writes and reads, the place of each piece in its file's header; nothing
in them is code.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, save

from tandem.checkpoint.export import export
from tandem.checkpoint.jsonfile import read_json, write_json
from tandem.model.mixture import apart, as_saved
from tandem.model.parallel.folder import ADAPTER, adapter_key, write_settings, write_weights
from tandem.model.parallel.load import Target, read, read_alone
from tandem.model.parallel.mesh import local
from tandem.model.parallel.model import ShardedModel
from tandem.model.parallel.shard import on_grid
from tandem.optimizer import Optimizer

WEIGHTS, OPTIMIZER, SETTINGS, STATE = "weights", "optimizer", "settings", "optimizer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def write_sharded(folder: Path, model: ShardedModel, optimizer: Optimizer) -> None:
    """Write this process's part below `folder`, which all processes must see. All call it in step."""
    _write(folder / WEIGHTS, model, _weights(model))
    steps = {
        name: float(optimizer.adamw.state[master]["step"])
        for name, master in optimizer.masters.items()
        if optimizer.adamw.state.get(master)
    }
    _write(folder / OPTIMIZER, model, _state(model, optimizer, steps))
    steps = model.grid.over_stages(steps)
    if dist.get_rank() == 0:
        write_settings(folder / SETTINGS, model)
        if isinstance(model.module, PeftModel):
            model.module.peft_config["default"].save_pretrained(folder / SETTINGS)
        write_json(folder / STATE, {"updates": optimizer.updates, "steps": steps})
    dist.barrier()


def read_sharded(folder: Path, model: ShardedModel, optimizer: Optimizer) -> None:
    """Bring model and optimizer to a checkpoint that any number of processes wrote; each reads its slices only."""
    figures = read_json(folder / STATE)
    read(model, _weights(model), folder / WEIGHTS)
    masters = optimizer.masters
    optimizer.adamw.state.clear()
    steps = {name: step for name, step in figures["steps"].items() if name in masters}
    for name, step in steps.items():
        master = masters[name]
        # The step count stays in host memory unless the kernel reads it.
        device = master.device if optimizer.adamw.defaults["fused"] else torch.device("cpu")
        optimizer.adamw.state[master] = {
            "step": torch.tensor(step, dtype=torch.float32, device=device),
            **{moment: torch.zeros_like(master, requires_grad=False) for moment in MOMENTS},
        }
    targets = _state(model, optimizer, steps)
    if targets:
        read(model, targets, folder / OPTIMIZER)
    optimizer.updates = figures["updates"]


def export_sharded(folder: Path, target: Path) -> Path:
    """One Hugging Face folder (of an adapter, its PEFT folder) from a checkpoint, in one process and without its
    layout; returns the real path."""

    def write(place: Path) -> None:
        shutil.copytree(folder / SETTINGS, place, dirs_exist_ok=True)
        adapter = (place / "adapter_config.json").is_file()
        whole = ((name, as_saved(name, weight)) for name, weight in _whole(folder / WEIGHTS))
        write_weights(place, (view for name, weight in whole for view in apart(name, weight)))
        if adapter:
            (place / "config.json").unlink()
            (place / "model.safetensors").rename(place / ADAPTER)

    return export(write, target)


def _weights(model: ShardedModel) -> dict[str, Target]:
    """What trains, by its name in the files."""
    if isinstance(model.module, PeftModel):
        return {adapter_key(n): Target(n, weight, local(weight)) for n, weight in model.trainable().items()}
    named = model.module.named_parameters()
    return {model.hf_name(n): Target(n, weight, local(weight)) for n, weight in named}


def _state(model: ShardedModel, optimizer: Optimizer, names: dict[str, float]) -> dict[str, Target]:
    """Moments of the given weights, and all masters that are not the weights themselves."""
    weights, masters = model.trainable(), optimizer.masters
    found = {
        f"{moment}/{name}": Target(name, weights[name], optimizer.adamw.state[masters[name]][moment])
        for moment in MOMENTS
        for name in names
    }
    return found | {
        f"master/{name}": Target(name, weights[name], values)
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
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
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
