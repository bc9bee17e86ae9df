"""The road between processes on one device, or on the CPU of one machine: handles of its memory, no bytes.

On a GPU they are handles of the tensors themselves, on a CPU of a copy in memory that has no name in any folder. Either
is gone with the sender's process.
"""

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from tandem.engine.roads import offer_of, size_of
from tandem.engine.weights import Offer, TensorSpec, Weights, announced, checksum
from tandem.errors import RunError

ALIGNED = 64
"""Bytes: each tensor in host memory begins at a multiple of this."""


class Memory(Protocol):
    """Of a device, as two processes see it."""

    place: str
    """Which device it is; the same in all processes."""

    def share(
        self, specs: Sequence[TensorSpec], weights: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor, Any]]:
        """Name, tensor and handle of each weight, which stay good until the next call or `release`."""
        ...

    def open(self, handle: Any, spec: TensorSpec) -> Tensor:
        """What another process shares."""
        ...

    def release(self) -> None: ...


class GpuMemory:
    """The tensors themselves: where they are the model's own, nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.place = str(torch.get_device_module(device).get_device_properties(device).uuid)
        self._held: list[Tensor] = []

    def share(
        self, specs: Sequence[TensorSpec], weights: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor, Any]]:
        self._held = []
        for name, tensor in weights:
            self._held.append(tensor.detach().to(self.device).contiguous())
            yield name, self._held[-1], reduce_tensor(self._held[-1])[1]

    def open(self, handle: Any, spec: TensorSpec) -> Tensor:
        arguments = list(handle)
        # The GPU's number in the sender's process; in this one it may have another.
        arguments[6] = self.device.index or 0
        return rebuild_cuda_tensor(*arguments)

    def release(self) -> None:
        self._held = []


class HostMemory:
    """A file in memory that only its number within the sender's process leads to; Linux."""

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise RunError("weights by road ipc: between processes on a CPU it needs Linux; use files")
        self.place = platform.node()
        self._file: int | None = None

    def share(
        self, specs: Sequence[TensorSpec], weights: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor, Any]]:
        self.release()
        padded = [-(-size_of(spec) // ALIGNED) * ALIGNED for spec in specs]
        self._file = os.memfd_create("tandem-weights")
        os.ftruncate(self._file, sum(padded))
        path, number = f"/proc/{os.getpid()}/fd/{self._file}", os.fstat(self._file).st_ino
        bytes_N = torch.from_file(path, shared=True, size=sum(padded), dtype=torch.uint8)
        start = 0
        for (name, tensor), size in zip(weights, padded):
            there = bytes_N[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            yield name, there.copy_(tensor.detach()), (path, number, start)
            start += size

    def open(self, handle: Any, spec: TensorSpec) -> Tensor:
        path, number, start = handle
        end = start + size_of(spec)
        # Another file may have got the number of one that was let go of.
        if not Path(path).exists() or Path(path).stat().st_ino != number:
            raise RunError(f"tensor {spec.name} by road ipc: its sender is gone, or has let go of it")
        bytes_N = torch.from_file(path, shared=False, size=end, dtype=torch.uint8)
        return bytes_N[start:].view(getattr(torch, spec.dtype)).view(spec.shape)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class IpcRoad:
    """The sender keeps what it offered last until `close`. Engines on several GPUs take the `joined` offers of the
    trainer's ranks on those GPUs."""

    rereadable = True

    def __init__(self, device: torch.device) -> None:
        self._memory: Memory = HostMemory() if device.type == "cpu" else GpuMemory(device)

    def offer(self, version: int, weights: Weights, *, verify: bool = True) -> Offer:
        handles, sums = [], {}
        arriving = announced(weights, version, "ipc")
        for name, tensor, handle in self._memory.share(weights.specs(), arriving):
            handles.append((name, handle))
            if verify:
                sums[name] = checksum(tensor)
        return offer_of(
            version, "ipc", weights, sums if verify else None, verify, {self._memory.place: handles}
        )

    def read(self, offer: Offer) -> Iterator[tuple[str, Tensor]]:
        if self._memory.place not in offer.place:
            raise RunError(
                f"weights of version {offer.version} by road ipc are in the memory of {', '.join(sorted(offer.place))} "
                f"and the engine's is that of {self._memory.place}; use engine.transfer=files, or broadcast"
            )
        specs = {spec.name: spec for spec in offer.specs}
        for name, handle in offer.place[self._memory.place]:
            yield name, self._memory.open(handle, specs[name])

    def close(self) -> None:
        self._memory.release()


def joined(offers: Sequence[Offer]) -> Offer:
    """One offer of the same weights from the trainer's ranks, each with the handles of its own device."""
    places = {place: handles for offer in offers for place, handles in offer.place.items()}
    return replace(offers[0], place=places)
