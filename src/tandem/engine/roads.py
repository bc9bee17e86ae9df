"""The roads of the weights: within a process, through files, by broadcast; that by handles of memory is in `ipc`.

Every road has a sender's `offer` and a receiver's `read`; `rereadable` roads can be read twice, so that a receiver
verifies everything before it changes anything.
"""

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tandem.engine.weights import Offer, TensorSpec, Weights, announced, checksum, compare
from tandem.errors import RunError
from tandem.model.parallel.meeting import meet

BUCKET = 1 << 28
"""Bytes that a broadcast sends, and a file holds, at a time; a larger tensor goes alone."""
ADAPTER = "adapter_model.safetensors"
SHARED = Path("/dev/shm")
WRITTEN = re.compile(r"v\d+(\.tmp-[0-9a-f]+)?")
"""Folder of a version, or of one that is not whole yet."""
BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"


class Road(Protocol):
    """One way for weights to travel."""

    rereadable: bool

    def read(self, offer: Offer) -> Iterator[tuple[str, Tensor]]:
        """The tensors of an offer, in its order, on the receiver's device or the CPU."""
        ...


class RoadBroken(RunError):
    """A transfer that ended in the middle, because one of its processes is silent or gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where a receiver of a broadcast meets the others, and its place among them."""

    number: int
    """Of the group, so that none is taken for an earlier one."""
    host: str
    port: int
    first_rank: int
    """Of the receiver; with tensor parallelism its other workers follow."""
    size: int
    timeout_s: float


class MemoryRoad:
    """Sender and receiver are one process."""

    rereadable = True

    def offer(self, version: int, weights: Weights, *, verify: bool = True) -> Offer:
        sums = {name: checksum(tensor) for name, tensor in weights} if verify else None
        return offer_of(version, "memory", weights, sums, verify, weights)

    def read(self, offer: Offer) -> Iterator[tuple[str, Tensor]]:
        return iter(offer.place)


class FilesRoad:
    """A folder per version below `root`, in safetensors files, which appears whole or not at all.

    `root` is one sender's, and for its user only: before the first version whatever an earlier sender left there goes,
    then the newest `keep` versions stay, and `close` removes it. Without a `root` it is a new one in shared memory.
    """

    rereadable = True

    def __init__(self, root: Path | None = None, keep: int = 2) -> None:
        self.root, self.keep = root, keep
        self._begun = False

    def offer(self, version: int, weights: Weights, *, verify: bool = True) -> Offer:
        if self.root is None:
            self.root = Path(
                tempfile.mkdtemp(prefix="tandem-weights-", dir=SHARED if SHARED.is_dir() else None)
            )
        folder = self.root / f"v{version:08d}"
        tmp = self.root / f"{folder.name}.tmp-{secrets.token_hex(6)}"
        try:
            self._begin(self.root)
            tmp.mkdir(mode=0o700)
            offer = offer_of(version, "files", weights, _write(tmp, weights, verify), verify, str(folder))
            if folder.exists():
                shutil.rmtree(folder)
            tmp.rename(folder)
        except (OSError, SafetensorError) as cause:
            raise RunError(
                f"weights of version {version} cannot be written to engine.transfer_dir={self.root}: {cause}"
            ) from cause
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        for old in self._versions()[: -self.keep]:
            shutil.rmtree(old)
        return offer

    def read(self, offer: Offer) -> Iterator[tuple[str, Tensor]]:
        if not Path(offer.place).is_dir():
            raise RunError(
                f"weights of version {offer.version} by road files: there is no folder {offer.place} here; trainer and "
                "engines must see the same engine.transfer_dir"
            )
        for path in sorted(Path(offer.place).glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    # Tensors of an open file are views of its mapping; the folder may go while they are in use.
                    for name in file.keys():  # noqa: SIM118
                        yield name, file.get_tensor(name).clone()
            except (OSError, SafetensorError) as cause:
                raise RunError(
                    f"weights of version {offer.version} by road files: {path} cannot be read: {cause}"
                ) from cause

    def close(self) -> None:
        """Remove the versions, and `root` unless something else is in it."""
        if self.root is None or not self._begun:
            return
        for folder in self._written():
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            self.root.rmdir()

    def _begin(self, root: Path) -> None:
        """Have `root` for this sender alone, if that was not done yet."""
        if self._begun:
            return
        try:
            root.mkdir(parents=True, mode=0o700)
        except FileExistsError:
            check_own(root)
            root.chmod(0o700)
        for folder in self._written():
            shutil.rmtree(folder)
        self._begun = True

    def _versions(self) -> list[Path]:
        return [folder for folder in self._written() if not folder.suffix]

    def _written(self) -> list[Path]:
        """The folders of versions, and those that are not whole."""
        if self.root is None:
            return []
        return sorted(p for p in self.root.glob("v*") if WRITTEN.fullmatch(p.name))


def check_own(root: Path) -> None:
    """RunError where something else is there than a folder of this user's: others can foretell its name."""
    if os.path.lexists(root):
        found = root.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise RunError(
                f"weights cannot be written to engine.transfer_dir={root}: what is there is no folder of this user's "
                f"(its owner is user {found.st_uid}); remove it, or set another engine.transfer_dir"
            )


def _write(folder: Path, weights: Weights, verify: bool) -> dict[str, int] | None:
    """Files of at most BUCKET bytes, so that no copy of the whole model is held; returns the checksums."""
    sums: dict[str, int] = {}
    part: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        name = ADAPTER if weights.adapter else f"weights-{number:05d}.safetensors"
        save_file(part, folder / name)
        number += 1
        part.clear()

    for name, tensor in weights:
        if verify:
            sums[name] = checksum(tensor)
        full = sum(t.nbytes for t in part.values()) + tensor.nbytes > BUCKET
        if part and full and not weights.adapter:
            flush()
        part[name] = tensor.detach().cpu().contiguous()
    flush()
    if weights.adapter:
        weights.adapter.save_pretrained(str(folder))
    return sums if verify else None


class BroadcastRoad:
    """A process group with the sender at rank 0 and the receivers after it: gloo on a CPU, NCCL on NVIDIA GPUs.

    The sender opens the meeting point, says its `port` to the receivers, and both call `connect`. Weights go in
    buckets with the checksums after each; a transfer that breaks off leaves a receiver with some of the new ones.
    Whoever waits longer than `timeout_s` for the others gets a `RoadBroken`, and the group is of no more use.
    """

    rereadable = False

    def __init__(
        self, host: str, port: int, rank: int, size: int, device: torch.device, timeout_s: float = 300.0
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.timeout = timedelta(seconds=timeout_s)
        try:
            self._store = meet(host, port, rank == 0, self.timeout)
        except (OSError, RuntimeError) as cause:
            raise self._nobody(cause) from cause
        self.port = self._store.port
        self._group: Any = None

    def connect(self) -> None:
        """Wait until all are there."""
        try:
            if self.device.type == "cpu":
                self._group = dist.ProcessGroupGloo(self._store, self.rank, self.size, self.timeout)
            else:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self.timeout
                with _errors_are_raised():
                    self._group = dist.ProcessGroupNCCL(self._store, self.rank, self.size, options)
        except RuntimeError as cause:
            raise self._nobody(cause) from cause

    @property
    def connected(self) -> bool:
        return self._group is not None

    def offer(self, version: int, weights: Weights, *, verify: bool = True) -> Offer:
        return offer_of(version, "broadcast", weights, None, verify, None)

    def send(self, offer: Offer, weights: Weights) -> None:
        """Send what was offered, while all receivers read it."""
        arriving = announced(weights, offer.version, offer.road)
        for bucket in buckets(offer.specs, BUCKET):
            tensors = [next(arriving)[1].to(self.device) for _ in bucket]
            bytes_N = torch.cat([t.detach().contiguous().reshape(-1).view(torch.uint8) for t in tensors])
            self._broadcast(bytes_N, offer, bucket)
            if offer.verify:
                self._broadcast(torch.tensor([checksum(t) for t in tensors]).to(self.device), offer, bucket)

    def read(self, offer: Offer) -> Iterator[tuple[str, Tensor]]:
        waiting = deque(buckets(offer.specs, BUCKET))
        try:
            while waiting:
                yield from self._receive(offer, waiting.popleft())
        finally:
            # The sender goes on to the end: a receiver that left early would keep it and all others waiting.
            while waiting and self._group is not None:
                self._take(offer, waiting.popleft())

    def _receive(self, offer: Offer, bucket: list[TensorSpec]) -> list[tuple[str, Tensor]]:
        tensors, sums = self._take(offer, bucket)
        for spec, tensor, sent in zip(bucket, tensors, sums):
            compare(offer, spec.name, sent, checksum(tensor))
        return [(spec.name, tensor) for spec, tensor in zip(bucket, tensors)]

    def _take(self, offer: Offer, bucket: list[TensorSpec]) -> tuple[list[Tensor], list[int]]:
        """The tensors of the next bucket, and their checksums, none where they are not compared."""
        sizes = [size_of(spec) for spec in bucket]
        # Not one buffer for all: a receiver may keep a tensor until the rest of its layer has come.
        bytes_N = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        self._broadcast(bytes_N, offer, bucket)
        tensors = [
            part.clone().view(getattr(torch, spec.dtype)).view(spec.shape)
            for spec, part in zip(bucket, bytes_N.split(sizes))
        ]
        sum_N = torch.zeros(len(bucket) if offer.verify else 0, dtype=torch.int64, device=self.device)
        if offer.verify:
            self._broadcast(sum_N, offer, bucket)
        return tensors, sum_N.tolist()

    def close(self) -> None:
        self._group = None

    def _nobody(self, cause: OSError | RuntimeError) -> RoadBroken:
        return RoadBroken(
            f"rank {self.rank} of {self.size} found no group for the weights within {self.timeout}: {cause}"
        )

    def _broadcast(self, tensor: Tensor, offer: Offer, bucket: Sequence[TensorSpec]) -> None:
        if self._group is None:
            raise RoadBroken(
                f"weights of version {offer.version} by road broadcast: the group is not connected (any more)"
            )
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = 0, self.timeout
        try:
            self._group.broadcast([tensor], options).wait()
        except RuntimeError as cause:
            self._group = None
            raise RoadBroken(
                f"weights of version {offer.version} by road broadcast: broke off at tensor {bucket[0].name}: {cause}"
            ) from cause


@contextmanager
def _errors_are_raised() -> Iterator[None]:
    """NCCL groups made inside raise at a deadline; others end their process."""
    before = os.environ.get(BLOCKING)
    os.environ[BLOCKING] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[BLOCKING]
        else:
            os.environ[BLOCKING] = before


def buckets(specs: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    """In order, as many together as stay within `limit` bytes; both ends cut alike."""
    bucket: list[TensorSpec] = []
    for spec in specs:
        if bucket and sum(map(size_of, bucket)) + size_of(spec) > limit:
            yield bucket
            bucket = []
        bucket.append(spec)
    if bucket:
        yield bucket


def size_of(spec: TensorSpec) -> int:
    """Bytes of the tensor."""
    return torch.Size(spec.shape).numel() * getattr(torch, spec.dtype).itemsize


def offer_of(
    version: int, road: str, weights: Weights, sums: dict[str, int] | None, verify: bool, place: object
) -> Offer:
    return Offer(
        version=version,
        road=road,
        specs=weights.specs(),
        checksums=sums,
        verify=verify,
        adapter=weights.adapter is not None,
        place=place,
    )
