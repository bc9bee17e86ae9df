"""What a check before the run has to say."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]
Line = tuple[Status, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the check."""

    status: Status
    name: str
    """What was looked at."""
    text: str
    seconds: float
    """Time that the look took; all lines of one look carry the same."""
