"""Tensors whose numbers wait in host memory, so that another process can have the device's."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tandem.device import give_back


class Asleep:
    """From when it is made until it is woken, the tensors have no numbers.

    Their storages are emptied and filled again, so whoever holds a tensor, a view or a shard of it holds it still. On
    a device the numbers wait in host memory, and tensors that are there anyway stay; where the device is the host they
    wait in another place of it.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self.device = device
        self._host: dict[torch.UntypedStorage, Tensor] = {}
        for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values():
            # What is mapped from a file is nobody's memory.
            if storage.device.type == device.type and storage.nbytes() and storage.resizable():
                self._host[storage] = host_bytes(storage)
                storage.resize_(0)
        give_back(device)

    @property
    def nbytes(self) -> int:
        """That wait."""
        return sum(waiting.nbytes for waiting in self._host.values())

    def wake(self) -> None:
        """The tensors have their numbers again, bit for bit."""
        for storage, waiting in self._host.items():
            storage.resize_(waiting.nbytes)
            numbers(storage).copy_(waiting, non_blocking=True)
        self._host.clear()


def host_bytes(storage: torch.UntypedStorage) -> Tensor:
    """A copy in host memory from which the device can read by itself."""
    held = numbers(storage)
    waiting = torch.empty(held.shape, dtype=held.dtype, pin_memory=held.device.type != "cpu")
    return waiting.copy_(held)


def numbers(storage: torch.UntypedStorage) -> Tensor:
    """The bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
