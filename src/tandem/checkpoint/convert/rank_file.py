"""The file of one rank, as `torch.save` makes it, but with its tensors written one after another."""

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tandem.checkpoint.disk import failure

_HEADER = struct.Struct("<26xHH")
"""Before an entry of an archive: the lengths of its name and extra field, which follow."""
_LISTED = struct.Struct("<28xHHH12x")
"""Of an entry in the archive's directory: the lengths of its name, extra field and comment, which follow."""
_BEHIND, _WITHIN = 4, 16
"""Where the checksum is: in what follows an entry, and in the directory."""


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
    """A file that PyTorch reads: `plain` and the tensors; `written` is told the bytes of each tensor.

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
    listed = [entry for chunk in entries.values() for entry in chunk.values()]
    with path.open("r+b") as file:
        for entry, (at, noted) in zip(listed, _rooms(path), strict=True):
            file.seek(at)
            checksum = struct.pack("<I", _fill(file, entry))
            for place in (at + entry.nbytes + _BEHIND, noted):
                file.seek(place)
                file.write(checksum)
            written(entry.nbytes)


def _fill(file: BinaryIO, entry: Entry) -> int:
    """Write a tensor where the file stands; returns its checksum."""
    checksum = size = 0
    for part in entry.parts():
        held = part.contiguous().view(torch.uint8).numpy().data
        checksum, size = zlib.crc32(held, checksum), size + held.nbytes
        file.write(held)
    if size != entry.nbytes:
        raise ValueError(f"{size} bytes for a tensor of {entry.nbytes}")
    return checksum


def _rooms(path: Path) -> list[tuple[int, int]]:
    """Where each tensor begins, in the order in which they were saved, and where the directory has its checksum."""
    with ZipFile(path) as archive:
        entries, at = archive.infolist(), archive.start_dir
    rooms = []
    with path.open("rb") as file:
        for entry in entries:
            if entry.filename.split("/")[-2] == "data":
                file.seek(entry.header_offset)
                name, extra = _HEADER.unpack(file.read(_HEADER.size))
                rooms.append((entry.header_offset + _HEADER.size + name + extra, at + _WITHIN))
            file.seek(at)
            at += _LISTED.size + sum(_LISTED.unpack(file.read(_LISTED.size)))
    return rooms
