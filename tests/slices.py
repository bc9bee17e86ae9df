"""How much of a folder's weights a process reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file


class Counting:
    """`safe_open` that counts the bytes of the slices taken."""

    read = 0

    def __init__(self, *args: Any, **keys: Any) -> None:
        self._file = safe_open(*args, **keys)

    def __enter__(self) -> "Counting":
        self._file = self._file.__enter__()
        return self

    def __exit__(self, *cause: Any) -> None:
        self._file.__exit__(*cause)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> "CountingSlice":
        return CountingSlice(self._file.get_slice(name))


class CountingSlice:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        part = self._inner[index]
        Counting.read += part.nbytes
        return part


@contextmanager
def counted_reads() -> Iterator[type[Counting]]:
    """`read` of what this gives are the bytes of weights that were read inside."""
    Counting.read = 0
    safetensors.safe_open = Counting
    yield Counting
    safetensors.safe_open = safe_open


def weight_bytes(folder: Path) -> int:
    """Of all files of a folder together."""
    return sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())
