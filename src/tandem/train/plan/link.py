"""Time that processes take to exchange what they hold."""

import math
from dataclasses import dataclass

from tandem.train.plan.device import Exchanges, Rates

NEAR_S, FAR_S = 2e-6, 10e-6
"""Assumed time of one message, however short, inside a node and between nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The links of `count` devices in nodes of `per_node`. A group is `size` ranks, each `stride` after the one
    before; all groups of a kind exchange at the same time."""

    count: int
    per_node: int
    near: float
    far: float
    exchanges: Exchanges | None = None
    """Of processes in one node, where they were measured."""

    def _measured(self, size: int, stride: int) -> Exchanges | None:
        return self.exchanges if size * stride <= self.per_node else None

    def hold(self, groups: int, size: int) -> bool:
        """Whether so many groups of `size` devices each find a node for all of them."""
        nodes, rest = divmod(self.count, self.per_node)
        return groups <= nodes * (self.per_node // size) + rest // size

    def rate(self, size: int, stride: int) -> float:
        """Bytes per second that each member sends. Between nodes the members in one node share their network cards,
        which each have a part of."""
        if size * stride <= self.per_node:
            return self.near
        return min(self.near, self.far * max(1, self.per_node // stride))

    def message_s(self, size: int, stride: int) -> float:
        return NEAR_S if size * stride <= self.per_node else FAR_S

    def ring_s(self, size: int, stride: int) -> float:
        """Messages of a ring, one after another: every member passes on what came from the one before."""
        inside = min(size, max(1, self.per_node // stride))
        nodes = -(-size // inside)
        return (size - nodes) * NEAR_S + (nodes * FAR_S if nodes > 1 else 0.0)

    def all_gather(self, size_bytes: float, size: int, stride: int) -> float:
        """Everyone gets all of `size_bytes`."""
        if size == 1:
            return 0.0
        sent = size_bytes * (size - 1) / size
        if measured := self._measured(size, stride):
            return measured.gather.seconds(sent, size - 1)
        return sent / self.rate(size, stride) + self.ring_s(size, stride)

    def reduce_scatter(self, size_bytes: float, size: int, stride: int) -> float:
        """The reverse: everyone gets a part of the sum of the `size_bytes` of all."""
        if measured := self._measured(size, stride):
            return measured.scatter.seconds(size_bytes * (size - 1) / size, size - 1)
        return self.all_gather(size_bytes, size, stride)

    def all_reduce(self, size_bytes: float, size: int, stride: int) -> float:
        """By trees, whose depth is the logarithm of the members."""
        if size == 1:
            return 0.0
        sent = 2 * size_bytes * (size - 1) / size
        if measured := self._measured(size, stride):
            return measured.reduce.seconds(sent, size - 1)
        return sent / self.rate(size, stride) + 2 * math.log2(size) * self.message_s(size, stride)

    def exchange(self, size_bytes: float, size: int, stride: int) -> float:
        """Each sends another part of its `size_bytes` to everyone."""
        if size == 1:
            return 0.0
        sent = size_bytes * (size - 1) / size
        if measured := self._measured(size, stride):
            return measured.turn.seconds(sent, size - 1)
        rate = self.near if size * stride <= self.per_node else min(self.near, self.far)
        return sent / rate + math.log2(size) * self.message_s(size, stride)

    def send(self, size_bytes: float, stride: int) -> float:
        """To the process `stride` further on."""
        if measured := self._measured(2, stride):
            return measured.send.seconds(size_bytes, 1)
        return size_bytes / self.rate(2, stride) + self.message_s(2, stride)


def links(rates: Rates, count: int, per_node: int) -> Links:
    return Links(count=count, per_node=per_node, near=rates.near, far=rates.far, exchanges=rates.exchanges)
