"""The reward of the step benchmark: cheap, and never the same for two answers, so that every answer is trained on."""

import zlib
from typing import Any


def scrambled(answer: str) -> float:
    """The text's checksum, between 0 and 1."""
    return zlib.crc32(answer.encode()) / 2**32


def scrambled_all(completions: list[str], **_: Any) -> list[float]:
    """The same as TRL calls it."""
    return [scrambled(text) for text in completions]
