"""What a reward function is told of one answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.types import ScoredBy


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    """The answer up to, not including, its end token."""
    truth: str | None
    question: str
    row: Mapping[str, Any]
    """The source row. Columns that JSON cannot hold (images, bytes) do not reach a reward function."""
    tokens: int
    """Length of the answer, its end token included."""
    finish: str
    """stop | length"""
    scored_by: "ScoredBy | None" = None
    """None for all terms of the reward."""
