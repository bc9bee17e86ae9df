"""How long a worker has for a call, and the key that says so."""

from dataclasses import dataclass

from tandem.config.placement import Placement


@dataclass(frozen=True, slots=True)
class Limit:
    seconds: float
    key: str

    def __str__(self) -> str:
        return f"within {self.seconds:g} s ({self.key}; raise it where more is needed)"


def start_limit(placement: Placement) -> Limit:
    """To be made, and to load a model."""
    return Limit(placement.start_timeout_s, "placement.start_timeout_s")


def engine_limit(placement: Placement, share: float = 1.0) -> Limit:
    """For a new token, or a transfer; or a share of that."""
    return Limit(placement.engine_timeout_s * share, "placement.engine_timeout_s")


def learner_limit(placement: Placement) -> Limit:
    """For one call."""
    return Limit(placement.learner_timeout_s, "placement.learner_timeout_s")
