"""Answers for the tests of rewards, and short forms of their scores."""

from typing import Any

from tandem.rewards.answer import Answer
from tandem.types import Score


def answer(text: str, truth: str | None = "4", **fields: Any) -> Answer:
    given = {"question": "2+2?", "row": {}, "tokens": 10, "finish": "stop"} | fields
    return Answer(text=text, truth=truth, **given)


def group(*texts: str) -> list[Answer]:
    return [answer(text) for text in texts]


def kinds(scores: list[Score]) -> list[str | float | None]:
    return [score.failure or score.reward for score in scores]


def number(value: int) -> str:
    return f"<answer>{value}</answer>"
