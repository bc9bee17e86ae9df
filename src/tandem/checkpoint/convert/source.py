"""Where weights are read from: tensors by their Hugging Face names, a slice at a time."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tandem.errors import RunError


class Source(Protocol):
    """`shapes` and `dtype` come from headers; `read` is what moves bytes."""

    shapes: Mapping[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        """`name[start:stop]` along `dim`; it may be a view of a file, so copy before keeping it."""
        ...


class Cast:
    """Another source in one type."""

    def __init__(self, inner: Source, dtype: torch.dtype) -> None:
        self.shapes = inner.shapes
        self._inner = inner
        self._dtype = dtype

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        given = self._inner.read(name, start, stop, dim)
        cast = given.to(self._dtype)
        if bool(cast.isinf().any()) and not bool(given.isinf().any()):
            raise RunError(
                f"{name} has values up to {given.abs().max().item():g}, too large for {self._dtype}: "
                "convert with --dtype bf16 or fp32"
            )
        return cast


def whole(source: Source, name: str) -> Tensor:
    return source.read(name, 0, source.shapes[name][0], 0)


def size_in_bytes(source: Source, name: str) -> int:
    return torch.Size(source.shapes[name]).numel() * source.dtype(name).itemsize
