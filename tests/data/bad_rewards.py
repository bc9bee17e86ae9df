"""Reward functions that fail in the ways reward functions fail."""

import time


def raises(answer: str) -> float:
    raise KeyError("no such column")


def raises_sometimes(answer: str, question: str) -> float:
    if question.startswith("1"):
        raise ValueError("a question that starts with 1")
    return len(answer) / 10


def hangs_sometimes(answer: str, question: str) -> float:
    if question.startswith("1"):
        time.sleep(3600)
    return len(answer) / 10


def constant(answer: str) -> float:
    return 1.0


def length(answer: str) -> float:
    return len(answer) / 10
