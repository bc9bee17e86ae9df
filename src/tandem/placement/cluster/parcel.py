"""Weights under way to engines in other processes, with what proves that they are computed with."""

from dataclasses import dataclass

from tandem.engine.probe import Probe
from tandem.engine.weights import Offer


@dataclass(frozen=True, slots=True)
class Parcel:
    """A version of the weights, and the probe that proves it, unless this one is not proved."""

    offer: Offer
    probe: Probe | None
