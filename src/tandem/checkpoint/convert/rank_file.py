"""The file of one rank, as `torch.save` makes it, but with its tensors written one after another."""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tandem.checkpoint.disk import failure

_SIGNATURE = 4
"""Bytes before the checksum in what follows an entry of an archive."""
_DIRECTORY_ENTRY = struct.Struct("<16xI8xHHH12x")
"""Of an entry in the archive's directory its checksum and the lengths of name, extra field and comment."""
_CHECKSUM_AT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor that is still to be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterator[Tensor]]
    """Its values end to end, of which only one part is in memory at a time."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Entries = Mapping[str, Mapping[str, Entry]]
"""`model`, or `model0` and so on -> name -> tensor."""


def write_rank(
    path: Path, plain: Mapping[str, Any], entries: Entries, written: Callable[[int], None]
) -> None:
    """A file that `torch.load` reads: `plain` and the tensors; `written` is told the bytes of each tensor.

    First everything but the values is saved, with room for them, then each goes into its place.
    """
    with FakeTensorMode():
        empty = {
            key: {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in chunk.items()}
            for key, chunk in entries.items()
        }
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**plain, **empty}, path)
    except RuntimeError as cause:
        # The writer of torch reports the system's errors under a type of its own.
        raise failure("the converted model", path.parent, OSError(str(cause).splitlines()[0])) from cause
    with FakeTensorMode():
        places = torch.load(path, weights_only=True)
    checksums = []
    with path.open("r+b") as file:
        for key, chunk in entries.items():
            for name, entry in chunk.items():
                file.seek(places[key][name].untyped_storage()._checkpoint_offset)
                checksums.append(_fill(file, entry))
                written(entry.nbytes)
    _note(path, checksums)


def _fill(file: BinaryIO, entry: Entry) -> int:
    """Write a tensor where the file stands, and its checksum behind it; returns that."""
    checksum = size = 0
    for part in entry.parts():
        held = part.contiguous().view(torch.uint8).numpy().data
        checksum, size = zlib.crc32(held, checksum), size + held.nbytes
        file.write(held)
    if size != entry.nbytes:
        raise ValueError(f"{size} bytes for a tensor of {entry.nbytes}")
    file.seek(_SIGNATURE, 1)
    file.write(struct.pack("<I", checksum))
    return checksum


def _note(path: Path, checksums: Iterable[int]) -> None:
    """Put the checksums of the tensors, in their order, into the archive's directory."""
    with ZipFile(path) as archive:
        names, at = archive.namelist(), archive.start_dir
    rest = iter(checksums)
    with path.open("r+b") as file:
        for name in names:
            file.seek(at)
            _, *lengths = _DIRECTORY_ENTRY.unpack(file.read(_DIRECTORY_ENTRY.size))
            if name.split("/")[-2] == "data":
                file.seek(at + _CHECKSUM_AT)
                file.write(struct.pack("<I", next(rest)))
            at += _DIRECTORY_ENTRY.size + sum(lengths)
