"""Weights under way to engines in other processes, with what proves that they are computed with."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.weights import Offer
from tandem.errors import RunError


@dataclass(frozen=True, slots=True)
class Parcel:
    """A version of the weights, and what the trainer says of a fixed text with it (nothing where it is not proved)."""

    offer: Offer
    probe: tuple[int, ...]
    logp: tuple[float, ...]
    tolerance: float

    def check(self, engine: str, scores: Sequence[float]) -> None:
        """What an engine says of the probe must be what the trainer says, or it computes with other weights."""
        for place, (theirs, ours) in enumerate(zip(scores, self.logp)):
            if abs(theirs - ours) > self.tolerance * (1 + abs(ours)):
                raise RunError(
                    f"{engine} and the trainer disagree on weights of version {self.offer.version}: log-probability of "
                    f"token {place + 1} of the probe is {theirs:.6f} for the engine and {ours:.6f} for the trainer "
                    f"(allowed {self.tolerance:g}). Training would follow wrong ratios"
                )
