"""One Hugging Face folder from a stream of weights, so that no process needs memory for the whole model."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tandem.model.language_model import LanguageModel
from tandem.model.mixture import as_saved

FILE_BYTES = 4 * 2**30
ADAPTER = "adapter_model.safetensors"


def write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]], file_bytes: int = FILE_BYTES) -> None:
    """Safetensors files of at most `file_bytes` (a larger tensor stands alone) and their index."""
    files: dict[str, list[str]] = {}
    pending: dict[str, Tensor] = {}
    total = waiting = 0

    def flush() -> None:
        file = f"part-{len(files) + 1:05d}.safetensors"
        save_file(pending, folder / file, metadata={"format": "pt"})
        files[file] = list(pending)
        pending.clear()

    for name, weight in weights:
        size = weight.numel() * weight.element_size()
        if pending and waiting + size > file_bytes:
            flush()
            waiting = 0
        pending[name] = weight.detach().to("cpu", copy=True).contiguous()
        waiting, total = waiting + size, total + size
    flush()
    where = {}
    for i, (file, names) in enumerate(files.items(), 1):
        final = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        (folder / file).rename(folder / final)
        where |= dict.fromkeys(names, final)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_settings(folder: Path, model: LanguageModel) -> None:
    """Everything of a Hugging Face folder but the weights."""
    network, config = model.network, model.network.config
    config.architectures = [type(network).__name__]
    config.save_pretrained(folder)
    if network.can_generate():
        network.generation_config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def write_folder(folder: Path, model: LanguageModel) -> None:
    """Rank 0 writes, all ranks gather; returns when the folder is whole. Any adapter is merged in."""
    weights = model.weights()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, weights)
        write_settings(folder, model)
    else:
        for _ in weights:
            pass
    dist.barrier()


def write_adapter(folder: Path, model: LanguageModel) -> None:
    """The folder of a PEFT adapter."""
    assert model.adapter is not None
    whole = {name: values.cpu().contiguous() for name, values in adapter_weights(model)}
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(whole, folder / ADAPTER)
        model.adapter.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
    dist.barrier()


def adapter_weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of an adapter, whole, as its file has them. All processes iterate, in step."""
    for name, weight in model.wholes(model.trainable()):
        yield adapter_key(name), as_saved(name, weight).detach()


def adapter_key(name: str) -> str:
    """The name in an adapter's file of a parameter of an adapted model."""
    return name.replace(".default.", ".").removesuffix(".default")
