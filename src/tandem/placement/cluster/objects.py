"""The road between nodes that share no folder: weights as objects that Ray brings to whoever asks for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tandem.engine.roads import BUCKET, buckets
from tandem.engine.weights import Offer, TensorSpec, Weights, announced, checksum, verified
from tandem.placement.cluster import port

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors, some at a time in one object, and the settings of the adapter whose they are, if any."""

    parts: Sequence[Any]
    adapter: "PeftConfig | None"


class ObjectsRoad:
    """As `FilesRoad`, with the tensors in Ray's memory. They live as long as someone holds the offer."""

    rereadable = True

    def offer(self, version: int, weights: Weights, *, verify: bool = True) -> Offer:
        sums: dict[str, int] = {}
        arriving, parts = announced(weights, version, "objects"), []
        for bucket in buckets(weights.specs(), BUCKET):
            tensors: dict[str, Tensor] = {}
            for _ in bucket:
                name, tensor = next(arriving)
                tensors[name] = tensor.detach().cpu().contiguous()
                if verify:
                    sums[name] = checksum(tensor)
            parts.append(port.share(tensors))
        return Offer(
            version=version,
            road="objects",
            specs=weights.specs(),
            checksums=sums if verify else None,
            verify=verify,
            adapter=weights.adapter is not None,
            place=Stored(parts, weights.adapter),
        )

    def read(self, offer: Offer) -> Iterator[tuple[str, Tensor]]:
        for shared in offer.place.parts:
            tensors: dict[str, Any] = port.fetch(shared)
            yield from tensors.items()

    def close(self) -> None:
        """Nothing lies anywhere."""


class ArrivedWeights:
    """What came by this road, to be sent on."""

    def __init__(self, offer: Offer) -> None:
        self._offer, self.adapter = offer, offer.place.adapter

    def specs(self) -> tuple[TensorSpec, ...]:
        return self._offer.specs

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return verified(self._offer, ObjectsRoad().read(self._offer))
