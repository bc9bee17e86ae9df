"""Hugging Face folders: safetensors read by slices, written shard by shard."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tandem.checkpoint.convert.architecture import IGNORED, LM_HEAD, Architecture, check_complete
from tandem.checkpoint.convert.document import read_object
from tandem.checkpoint.convert.source import Source, size_in_bytes, whole
from tandem.checkpoint.jsonfile import write_json
from tandem.errors import ConfigError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class HuggingFace:
    """The tensors of a folder, through memory-mapped files that stay open until `files` closes."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._file: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as cause:
                raise ConfigError(f"{path} is not a readable safetensors file: {cause}") from cause
            for name in file.keys():  # noqa: SIM118
                if not name.endswith(IGNORED):
                    self._add(name, file, path)

    def _add(self, name: str, file: Any, path: Path) -> None:
        header = file.get_slice(name)
        if header.get_dtype() not in DTYPES:
            raise ConfigError(
                f"{path}: {name} is stored as {header.get_dtype()}; only {', '.join(DTYPES)} can be converted, "
                "so start from the weights before they were quantized"
            )
        self.shapes[name] = tuple(header.get_shape())
        self._dtypes[name] = DTYPES[header.get_dtype()]
        self._file[name] = file

    def check(self, model: Architecture) -> None:
        """Exactly the model's tensors; the copy of a tied head that some folders keep is left out."""
        if model.tied:
            self.shapes.pop(LM_HEAD, None)
        check_complete(str(self.folder), self.shapes, model.shapes())

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        rows = self._file[name].get_slice(name)
        return rows[start:stop] if dim == 0 else rows[:, start:stop]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; `ConfigError` where one that the index names is missing."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(read_object(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{folder} lacks {len(missing)} files that {INDEX} names: {', '.join(missing)}; download them again"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    raise ConfigError(f"{folder} has neither model.safetensors nor {INDEX}; only safetensors are read")


def write_hugging_face(
    source: Source, model: Architecture, folder: Path, shard_bytes: int, say: Callable[[str], None]
) -> None:
    """Files of at most `shard_bytes` each (or one tensor), one of them in memory at a time."""
    shards = _shards(source, list(model.shapes()), shard_bytes)
    width = max(len(str(len(shards))), 5)
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:0{width}d}-of-{len(shards):0{width}d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        tensors = {name: whole(source, name).clone(memory_format=torch.contiguous_format) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # before the next ones come in
        weight_map |= dict.fromkeys(names, file)
        say(f"{file}  {sum(size_in_bytes(source, n) for n in names):,} bytes  ({i} of {len(shards)})")
    if len(shards) > 1:
        total = sum(size_in_bytes(source, name) for name in weight_map)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(source: Source, names: list[str], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in names:
        size = size_in_bytes(source, name)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards
