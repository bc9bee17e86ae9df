"""Weights by broadcast: both ends of it, the learner that sends and the driver that says who takes them together.

The group is that of the sender and of the engines that take a version at the same time. It stays while these are the
same, and is formed anew when one was lost, or when a transfer broke off.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tandem.config.placement import Placement
from tandem.engine.roads import BroadcastRoad, Meeting, RoadBroken
from tandem.engine.weights import Offer, TensorSpec, Weights, announced
from tandem.errors import RunError
from tandem.placement.cluster import port
from tandem.placement.cluster.parcel import Parcel

log = logging.getLogger("tandem.engines")


class KeptWeights:
    """A version of the weights in host memory."""

    def __init__(self, weights: Weights, version: int) -> None:
        self.adapter, self._specs = weights.adapter, weights.specs()
        arriving = announced(weights, version, "broadcast")
        self._tensors = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in arriving]

    def specs(self) -> tuple[TensorSpec, ...]:
        return self._specs

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors)


class Sender:
    """The learner's end. The newest `keep` versions stay in host memory, so that training goes on while one is sent,
    and an engine that is started anew gets the one that the others have."""

    def __init__(self, host: str, device: torch.device, keep: int) -> None:
        self.host, self.device, self.keep = host, device, keep
        self._versions: dict[int, KeptWeights] = {}
        self._road: BroadcastRoad | None = None

    def offer(self, version: int, weights: Weights, *, verify: bool = True) -> Offer:
        kept = self._versions[version] = KeptWeights(weights, version)
        for old in sorted(self._versions)[: -self.keep]:
            del self._versions[old]
        return Offer(
            version=version,
            road="broadcast",
            specs=kept.specs(),
            checksums=None,
            verify=verify,
            adapter=kept.adapter is not None,
        )

    def meet(self, number: int, size: int, timeout_s: float) -> Meeting:
        """Open the meeting point of a new group of `size` processes, of which this one is the first."""
        self._road = BroadcastRoad(self.host, 0, 0, size, self.device, timeout_s)
        return Meeting(
            number=number, host=self.host, port=self._road.port, first_rank=1, size=size, timeout_s=timeout_s
        )

    def send(self, offer: Offer) -> None:
        """Send a version to the group that was opened last, while its engines take it."""
        assert self._road is not None
        if not self._road.connected:
            self._road.connect()
        self._road.send(offer, self._versions[offer.version])

    def close(self) -> None:
        self._road = None
        self._versions.clear()


class Reading:
    """The driver's part where engines read the weights themselves, each when it can: there is none."""

    def waits(self, others_on_their_way: bool) -> bool:
        return False

    def offers(self, parcel: Parcel, workers: Sequence[port.Worker]) -> list[Offer]:
        return [parcel.offer] * len(workers)

    def broke(self, cause: RoadBroken) -> None:
        raise cause

    def part(self, worker: port.Worker) -> None:
        """Nobody depends on it."""


class Broadcasting:
    """The driver's part of broadcasts from `learner` to engines of `devices` processes each."""

    def __init__(self, learner: port.Worker, devices: int, placement: Placement) -> None:
        self.learner, self.devices, self.placement = learner, devices, placement
        self._members: list[port.Worker] = []
        self._meeting: Meeting | None = None
        self._sending: port.Call | None = None
        self._groups = self._breaks = 0

    def waits(self, others_on_their_way: bool) -> bool:
        """Whether the engines that lack a version must wait: for one that is being sent, or for others to take it with
        them. RunError where the learner cannot send."""
        if self._sending is not None and self._sending.done():
            sending, self._sending = self._sending, None
            try:
                sending.result(0)
                self._breaks = 0
            except RoadBroken as cause:
                self._break(cause)
        return self._sending is not None or others_on_their_way

    def offers(self, parcel: Parcel, workers: Sequence[port.Worker]) -> list[Offer]:
        """Begin to send; the offers for these engines, in their order, which they must take now."""
        if not workers:
            return []
        if self._meeting is None or self._members != list(workers):
            # Half of what an engine has for it: the others have given up before one that is silent is replaced.
            limit = self.placement.engine_timeout_s / 2
            self._groups += 1
            size = 1 + len(workers) * self.devices
            self._meeting = self.learner.call("meet", self._groups, size, limit).result(limit)
            self._members = list(workers)
        self._sending = self.learner.call("send", parcel.offer)
        places = [replace(self._meeting, first_rank=1 + i * self.devices) for i in range(len(workers))]
        return [replace(parcel.offer, place=place) for place in places]

    def broke(self, cause: RoadBroken) -> None:
        """An engine that lives did not get everything; it is sent to again."""
        self._meeting = None
        log.warning("%s; it is sent again", cause)

    def part(self, worker: port.Worker) -> None:
        """An engine is lost."""
        if worker in self._members:
            self._meeting = None

    def _break(self, cause: RoadBroken) -> None:
        self._meeting = None
        self._breaks += 1
        if self._breaks > self.placement.restarts:
            raise RunError(
                f"the broadcast of the weights broke off {self._breaks} times in a row (placement.restarts="
                f"{self.placement.restarts}). The last time: {cause}"
            ) from cause
        log.warning("%s; it is sent again", cause)
