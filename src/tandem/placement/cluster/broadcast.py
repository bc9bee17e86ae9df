"""Weights by broadcast: both ends of it, the learner that sends and the driver that says who takes them together.

The group is that of the sender and of the engines that take a version at the same time. It stays while these are the
same, and is formed anew when one was lost, or when a transfer broke off.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tandem.config.run import Run
from tandem.engine.roads import BroadcastRoad, Meeting, RoadBroken
from tandem.engine.weights import Offer, TensorSpec, Weights, announced
from tandem.placement.cluster import port
from tandem.placement.cluster.limit import Limit, engine_limit
from tandem.placement.cluster.lost import EnginesLost, WorkerLost, learner_lost
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
    """The driver's part where engines read what `learner` has laid ready, each when it can."""

    def __init__(self, learner: port.Worker, run: Run) -> None:
        self.learner, self.run = learner, run

    def waits(self, others_on_their_way: bool) -> bool:
        return False

    def offers(self, parcel: Parcel, workers: Sequence[port.Worker]) -> list[Offer]:
        return [parcel.offer] * len(workers)

    def broke(self, cause: RoadBroken) -> None:
        raise learner_lost(
            f"{self.learner} is lost with the weights that it shared. {cause}", self.run.run_dir
        )

    def part(self, worker: port.Worker) -> None:
        """Nobody depends on it."""


class Broadcasting:
    """The driver's part of broadcasts from `learner` to the engines of a run."""

    def __init__(self, learner: port.Worker, run: Run) -> None:
        self.learner, self.run, self.devices = learner, run, run.engine.tensor_parallel
        self._members: list[port.Worker] = []
        self._meeting: Meeting | None = None
        self._sending: port.Call | None = None
        self._version = -1
        self._groups = self._breaks = 0
        """Groups so far; broken transfers of one version."""

    def waits(self, others_on_their_way: bool) -> bool:
        """Whether the engines that lack a version must wait: for one that is being sent, or for others to take it with
        them. RunError where the learner is lost."""
        sending, limit = self._sending, engine_limit(self.run.placement)
        if sending is not None and (sending.done() or sending.seconds > limit.seconds):
            self._sending = None
            try:
                self._of_the_learner(sending, limit)
            except RoadBroken as cause:
                self.broke(cause)
        return self._sending is not None or others_on_their_way

    def offers(self, parcel: Parcel, workers: Sequence[port.Worker]) -> list[Offer]:
        """Begin to send; the offers for these engines, in their order, which they must take now."""
        if not workers:
            return []
        if self._meeting is None or self._members != list(workers):
            # Half of what an engine has for it: the others have given up before one that is silent is replaced.
            limit = engine_limit(self.run.placement, 1 / 2)
            self._groups += 1
            size = 1 + len(workers) * self.devices
            meeting = self.learner.call("meet", self._groups, size, limit.seconds)
            self._meeting = self._of_the_learner(meeting, limit)
            self._members = list(workers)
        if self._version != parcel.offer.version:
            self._version, self._breaks = parcel.offer.version, 0
        self._sending = self.learner.call("send", parcel.offer)
        places = [replace(self._meeting, first_rank=1 + i * self.devices) for i in range(len(workers))]
        return [replace(parcel.offer, place=place) for place in places]

    def broke(self, cause: RoadBroken) -> None:
        """One of those that live did not get everything, or could not send it: it is sent again, in a new group. Of a
        group that is given up already the others tell the same. EnginesLost where that does not help."""
        if self._meeting is None:
            return
        self._meeting = None
        self._breaks += 1
        restarts = self.run.placement.restarts
        if self._breaks > restarts:
            raise EnginesLost(
                f"the broadcast of version {self._version} of the weights broke off {self._breaks} times in a row "
                f"(placement.restarts={restarts}). The last time: {cause}"
            ) from cause
        log.warning("%s; it is sent again", cause)

    def part(self, worker: port.Worker) -> None:
        """An engine is lost."""
        if worker in self._members:
            self._meeting = None

    def _of_the_learner(self, call: port.Call, limit: Limit) -> Any:
        try:
            return call.result(limit)
        except WorkerLost as lost:
            raise learner_lost(lost, self.run.run_dir) from None
